// AVX2 with FMA, F16C and POPCNT: a table tells for each byte of the mask where 8 values go.
#include <immintrin.h>

#include "product.h"

namespace {

// 32 bytes an entry. A slot is the mask's byte times 4: as many bits are set, and the address is one of 8 times the slot.
struct Tables {
  alignas(64) uint8_t upper[256][32];  // 8 packed 16-bit values in both halves -> upper half of 8 32-bit lanes
  alignas(64) uint8_t words[256][32];  // 8 packed 16-bit values -> 8 16-bit lanes (16 bytes used)
  alignas(64) uint8_t top[256][32];    // 8 packed bytes in each quarter -> top byte of 8 32-bit lanes
  alignas(64) uint32_t lanes[256][8];  // 32-bit lane of each; the sign is set where there is none
  constexpr Tables() : upper{}, words{}, top{}, lanes{} {
    for (int bits = 0; bits < 256; bits++)
      for (int lane = 0, n = 0; lane < 8; lane++) {
        bool set = bits >> lane & 1;
        for (int byte = 0; byte < 4; byte++) upper[bits][4 * lane + byte] = top[bits][4 * lane + byte] = 0x80;
        for (int byte = 0; byte < 2; byte++) words[bits][2 * lane + byte] = set ? (uint8_t)(2 * n + byte) : 0x80;
        if (set) {
          upper[bits][4 * lane + 2] = (uint8_t)(2 * n);
          upper[bits][4 * lane + 3] = (uint8_t)(2 * n + 1);
          top[bits][4 * lane + 3] = (uint8_t)n;
        }
        lanes[bits][lane] = set ? (uint32_t)n : 0x80000000u;
        n += set;
      }
  }
};
constexpr Tables TABLES;  // constexpr: a constructor in this file would run on every processor

inline __m256i entry(const void* table, uint64_t slot) {
  return _mm256_load_si256((const __m256i*)((const uint8_t*)table + slot * 8));
}

struct FromBf16 {
  static constexpr float ONE = 1;
  static __m256 expand(const uint16_t* values, uint64_t slot) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, entry(TABLES.upper, slot)));
  }
};
inline __m128i words(const uint16_t* values, uint64_t slot) {
  return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values),
                          _mm256_castsi256_si128(entry(TABLES.words, slot)));
}
struct FromFp16 {
  static constexpr float ONE = 1;
  static __m256 expand(const uint16_t* values, uint64_t slot) { return _mm256_cvtph_ps(words(values, slot)); }
};
struct FromFp32 {
  static constexpr float ONE = 1;
  static __m256 expand(const float* values, uint64_t slot) {
    __m256i lanes = entry(TABLES.lanes, slot);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lanes), _mm256_setzero_ps(),
                            _mm256_castsi256_ps(lanes));
  }
};
struct FromInt8 {  // values times 2^24
  static constexpr float ONE = 1.0f / (1 << 24);
  static __m256 expand(const int8_t* values, uint64_t slot) {
    long long packed;
    memcpy(&packed, values, 8);
    __m256i top = _mm256_shuffle_epi8(_mm256_set1_epi64x(packed), entry(TABLES.top, slot));
    return _mm256_cvtepi32_ps(top);
  }
};

template <class V, class Expand>
struct Floats {
  typedef V Value;
  typedef uint8_t Bits;
  typedef __m256 Sum;
  typedef __m256 Weights;
  static constexpr float ONE = Expand::ONE;
  static constexpr bool DECODES = false;
  static Sum zero() { return _mm256_setzero_ps(); }
  static int64_t count(Bits bits) { return _mm_popcnt_u32(bits); }
  static Weights expand(const Value* values, Bits bits) { return Expand::expand(values, (uint64_t)bits << 2); }
  static Sum add(Sum sum, Weights weights, const float* x) { return _mm256_fmadd_ps(weights, _mm256_loadu_ps(x), sum); }
  static Sum scaled(Sum total, Sum sum, float scale) { return _mm256_fmadd_ps(sum, _mm256_set1_ps(scale * ONE), total); }
  static float total(Sum sum) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static Weights scale(Weights weights, float scale) { return _mm256_mul_ps(weights, _mm256_set1_ps(scale * ONE)); }
  static void store(void* dense, int32_t kind, Weights weights, int64_t n) {
    if (n == 8 && kind == FP32) return _mm256_storeu_ps((float*)dense, weights);
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, weights);
    for (int64_t i = 0; i < n; i++) put_number(dense, kind, i, lanes[i]);
  }
};

// The same, 32 columns a step: less to count for one token.
template <class V, class Expand>
struct Long : Floats<V, Expand> {
  typedef uint32_t Bits;
  struct Weights {
    __m256 at[4];
  };
  static int64_t count(Bits bits) { return _mm_popcnt_u32(bits); }
  static Weights expand(const V* values, Bits bits) {
    Weights found;
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
      uint64_t slot = (part ? (uint64_t)bits >> (8 * part - 2) : (uint64_t)bits << 2) & 0x3fc;
      found.at[part] = Expand::expand(values, slot);
      values += _mm_popcnt_u64(slot);
    }
    return found;
  }
  static __m256 add(__m256 sum, const Weights& weights, const float* x) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) sum = _mm256_fmadd_ps(weights.at[part], _mm256_loadu_ps(x + 8 * part), sum);
    return sum;
  }
};

// int4: a row's codes become the bytes that int8 has, without the halves that blocks leave unused, in scratch memory. The
// bytes of one block at a time, right before its products, took a tenth more time.
enum { ROWS_AT_ONCE = 4, BEHIND = BLOCK + AHEAD };  // bytes behind a row's values that a store or load may touch

inline __m256i numbers(const uint8_t* values) {  // of 32 codes
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15));
  __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)values));
  __m256i codes = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(table, codes);
}

template <class Int8>
struct Int4 : Int8 {
  static constexpr bool DECODES = true;
  static const int8_t* decoded(const Matrix* matrix, int64_t row, int place) {
    int8_t *first = (int8_t*)matrix->scratch + place * (matrix->columns + BEHIND), *to = first;
    const uint8_t* values = stored_values<uint8_t>(matrix, row);
    const uint8_t* mask = matrix->mask + row * matrix->mask_bytes;
    for (int64_t byte = 0; byte < matrix->mask_bytes; byte += BLOCK / 8) {
      int64_t count = _mm_popcnt_u64(bits_at<uint64_t>(mask + byte, matrix->mask_bytes - byte));
      __builtin_prefetch((const char*)values + FETCH);
      _mm256_storeu_si256((__m256i*)to, numbers(values));
      _mm256_storeu_si256((__m256i*)(to + 32), numbers(values + 16));
      to += count;
      values += (count + 1) / 2;
    }
    return first;
  }
};

// 16-bit values to the same kind: moved, not converted.
struct Moved {
  typedef uint16_t Value;
  static constexpr bool DECODES = false;
  typedef uint8_t Bits;
  typedef __m128i Weights;
  static int64_t count(Bits bits) { return _mm_popcnt_u32(bits); }
  static Weights expand(const Value* values, Bits bits) { return words(values, (uint64_t)bits << 2); }
  static Weights scale(Weights weights, float) { return weights; }
  static void store(void* dense, int32_t, Weights weights, int64_t n) {
    if (n == 8) return _mm_storeu_si128((__m128i*)dense, weights);
    alignas(16) uint16_t lanes[8];
    _mm_store_si128((__m128i*)lanes, weights);
    memcpy(dense, lanes, (size_t)n * 2);
  }
};

int64_t scratch(const Matrix* m) { return m->kind == INT4 ? ROWS_AT_ONCE * (m->columns + BEHIND) : 0; }

void arrange(const Matrix*, float*, int64_t) {}

template <class V, class Expand>
void few(const Matrix* matrix, const float* x, int64_t padded, int64_t tokens, int64_t low, int64_t high,
         const Output* out) {
  tokens_product<Floats<V, Expand>, 0, 2, 4, Long<V, Expand>, 3>(matrix, x, padded, tokens, low, high, out);
}

void product(const Matrix* m, const float* x, int64_t padded, int64_t tokens, int64_t low, int64_t high,
             const Output* out) {
  switch (m->kind) {
    case BF16: return few<uint16_t, FromBf16>(m, x, padded, tokens, low, high, out);
    case FP16: return few<uint16_t, FromFp16>(m, x, padded, tokens, low, high, out);
    case FP32: return few<float, FromFp32>(m, x, padded, tokens, low, high, out);
    case INT8: return few<int8_t, FromInt8>(m, x, padded, tokens, low, high, out);
    default: return tokens_product<Int4<Floats<int8_t, FromInt8>>, 0, 2, ROWS_AT_ONCE, Int4<Long<int8_t, FromInt8>>, 3>(
        m, x, padded, tokens, low, high, out);
  }
}

void expand(const Matrix* m, int64_t low, int64_t high, void* dense, int32_t kind) {
  if (m->kind == kind && kind != FP32) return rows_expand<Moved>(m, low, high, dense, kind);
  switch (m->kind) {
    case BF16: return rows_expand<Floats<uint16_t, FromBf16>>(m, low, high, dense, kind);
    case FP16: return rows_expand<Floats<uint16_t, FromFp16>>(m, low, high, dense, kind);
    case FP32: return rows_expand<Floats<float, FromFp32>>(m, low, high, dense, kind);
    case INT8: return rows_expand<Floats<int8_t, FromInt8>>(m, low, high, dense, kind);
    default: return rows_expand<Int4<Floats<int8_t, FromInt8>>>(m, low, high, dense, kind);
  }
}

}  // namespace

extern const Isa avx2_isa;
const Isa avx2_isa = {"avx2", 24, scratch, arrange, product, expand};
