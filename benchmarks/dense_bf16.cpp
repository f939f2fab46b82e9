// Dense bfloat16 matrix times vector, for comparison: four or eight far-apart rows at once, read in one direction each, as
// the packed kernels do. y (rows) = W (rows, columns) x, columns a multiple of 64; x is float for AVX2.
#include <immintrin.h>
#include <stdint.h>

namespace {
enum { FETCH = 1024 };

template <int ROWS>
__attribute__((target("avx512f,avx512bf16"))) void avx512(const uint16_t* w, const uint16_t* x, float* y, int64_t columns,
                                                          int64_t low, int64_t high) {
  int64_t apart = (high - low) / ROWS;
  for (int64_t i = 0; i < apart; i++) {
    __m512 sums[ROWS];
    const uint16_t* at[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = _mm512_setzero_ps(), at[r] = w + (low + r * apart + i) * columns;
    for (int64_t c = 0; c < columns; c += 32) {
      __m512bh part = (__m512bh)_mm512_loadu_si512(x + c);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        _mm_prefetch((const char*)(at[r] + c) + FETCH, _MM_HINT_T0);
        sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)_mm512_loadu_si512(at[r] + c), part);
      }
    }
    for (int r = 0; r < ROWS; r++) y[low + r * apart + i] = _mm512_reduce_add_ps(sums[r]);
  }
  if (ROWS > 1 && low + ROWS * apart < high) avx512<1>(w, x, y, columns, low + ROWS * apart, high);
}

template <int ROWS>
__attribute__((target("avx2,fma"))) void avx2(const uint16_t* w, const float* x, float* y, int64_t columns, int64_t low,
                                              int64_t high) {
  int64_t apart = (high - low) / ROWS;
  for (int64_t i = 0; i < apart; i++) {
    __m256 sums[ROWS];
    const uint16_t* at[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = _mm256_setzero_ps(), at[r] = w + (low + r * apart + i) * columns;
    for (int64_t c = 0; c < columns; c += 8) {
      __m256 part = _mm256_loadu_ps(x + c);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        if (!(c & 31)) _mm_prefetch((const char*)(at[r] + c) + FETCH, _MM_HINT_T0);
        __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(at[r] + c))), 16);
        sums[r] = _mm256_fmadd_ps(_mm256_castsi256_ps(wide), part, sums[r]);
      }
    }
    for (int r = 0; r < ROWS; r++) {
      float lanes[8], sum = 0;
      _mm256_storeu_ps(lanes, sums[r]);
      for (float lane : lanes) sum += lane;
      y[low + r * apart + i] = sum;
    }
  }
  if (ROWS > 1 && low + ROWS * apart < high) avx2<1>(w, x, y, columns, low + ROWS * apart, high);
}

template <class F>
void split(int64_t rows, int threads, F work) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; t++) work(rows * t / threads, rows * (t + 1) / threads);
}
}  // namespace

extern "C" void dense_avx512(const uint16_t* w, const uint16_t* x, float* y, int64_t rows, int64_t columns, int threads) {
  split(rows, threads, [=](int64_t low, int64_t high) { avx512<8>(w, x, y, columns, low, high); });
}
extern "C" void dense_avx2(const uint16_t* w, const float* x, float* y, int64_t rows, int64_t columns, int threads) {
  split(rows, threads, [=](int64_t low, int64_t high) { avx2<4>(w, x, y, columns, low, high); });
}
