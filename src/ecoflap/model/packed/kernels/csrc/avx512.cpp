// AVX-512 with VBMI2 (Ice Lake servers, Zen 4 and later): bits expand a step of 16 to 64 values at once.
//
// All sums are float. The instruction for bfloat16 products is not used: on Sapphire Rapids it competes with the expansion
// for the same port, and a step takes 5 cycles with it, 3.5 with two products in float.
#include <immintrin.h>

#include "product.h"

namespace {

// What all policies share: float lanes of x and sums.
struct Floats {
  typedef float X;
  typedef __m512 Sum;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum scaled(Sum total, Sum sum, float scale) { return _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), total); }
  static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
  static constexpr float ONE = 1;
};

// bfloat16, 32 columns a step: a 32-bit lane holds two neighbours. x lies as 16 even columns, then 16 odd ones.
struct Bf16 : Floats {
  typedef uint16_t Value;
  typedef uint32_t Bits;
  struct Weights {
    __m512 even, odd;
  };
  static int64_t count(Bits bits) { return _mm_popcnt_u32(bits); }
  static Weights expand(const Value* values, Bits bits) {
    __m512i both = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)))};
  }
  static Sum add(Sum sum, Weights weights, const X* x) {
    sum = _mm512_fmadd_ps(weights.even, _mm512_loadu_ps(x), sum);
    return _mm512_fmadd_ps(weights.odd, _mm512_loadu_ps(x + 16), sum);
  }
};

// int8, 64 columns a step: each byte of a 32-bit lane in turn becomes the lane's top byte, so that a weight is its value
// times 2^24 (ONE undoes that). x lies as the first columns of all fours, then the second ones, ...
struct Int8 : Floats {
  typedef int8_t Value;
  typedef uint64_t Bits;
  struct Weights {
    __m512 at[4];
  };
  static constexpr float ONE = 1.0f / (1 << 24);
  static int64_t count(Bits bits) { return _mm_popcnt_u64(bits); }
  static Weights expand(const Value* values, Bits bits) {
    __m512i four = _mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(values)), top = _mm512_set1_epi32((int)0xff000000);
    return {{_mm512_cvtepi32_ps(_mm512_slli_epi32(four, 24)),
             _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_slli_epi32(four, 16), top)),
             _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_slli_epi32(four, 8), top)),
             _mm512_cvtepi32_ps(_mm512_and_si512(four, top))}};
  }
  static Sum add(Sum sum, const Weights& weights, const X* x) {
    for (int byte = 0; byte < 4; byte++) sum = _mm512_fmadd_ps(weights.at[byte], _mm512_loadu_ps(x + 16 * byte), sum);
    return sum;
  }
  static Sum scaled(Sum total, Sum sum, float scale) { return _mm512_fmadd_ps(sum, _mm512_set1_ps(scale * ONE), total); }
};

// float16, 32 columns a step, and float32, 16: in their own order.
struct Fp16 : Floats {
  typedef uint16_t Value;
  typedef uint32_t Bits;
  struct Weights {
    __m512 low, high;
  };
  static int64_t count(Bits bits) { return _mm_popcnt_u32(bits); }
  static Weights expand(const Value* values, Bits bits) {
    __m512i both = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
  }
  static Sum add(Sum sum, Weights weights, const X* x) {
    sum = _mm512_fmadd_ps(weights.low, _mm512_loadu_ps(x), sum);
    return _mm512_fmadd_ps(weights.high, _mm512_loadu_ps(x + 16), sum);
  }
};
struct Fp32 : Floats {
  typedef float Value;
  typedef uint16_t Bits;
  typedef __m512 Weights;
  static int64_t count(Bits bits) { return _mm_popcnt_u32(bits); }
  static Weights expand(const Value* values, Bits bits) {
    return _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(values));
  }
  static Sum add(Sum sum, Weights weights, const X* x) { return _mm512_fmadd_ps(weights, _mm512_loadu_ps(x), sum); }
};

// Rows to dense ones, 16 columns a step in their own order; `load` gives float lanes.
template <class V, __m512 (*load)(const V*, uint16_t)>
struct Dense {
  typedef V Value;
  typedef uint16_t Bits;
  typedef __m512 Weights;
  static int64_t count(Bits bits) { return _mm_popcnt_u32(bits); }
  static Weights expand(const Value* values, Bits bits) { return load(values, bits); }
  static Weights scale(Weights weights, float scale) { return _mm512_mul_ps(weights, _mm512_set1_ps(scale)); }
  static void store(void* dense, int32_t kind, Weights weights, int64_t n) {
    if (kind == FP32 && n == 16) return _mm512_storeu_ps(dense, weights);
    __mmask16 kept = (__mmask16)((1u << n) - 1);
    if (kind == FP32) return _mm512_mask_storeu_ps(dense, kept, weights);
    if (kind == FP16) return _mm256_mask_storeu_epi16(dense, kept, _mm512_cvtps_ph(weights, _MM_FROUND_TO_NEAREST_INT));
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, weights);
    for (int64_t i = 0; i < n; i++) put_number(dense, kind, i, lanes[i]);
  }
};
inline __m256i sixteen(const uint16_t* values, uint16_t bits) {
  return _mm256_maskz_expand_epi16(bits, _mm256_loadu_si256((const __m256i*)values));
}
inline __m512 from_bf16(const uint16_t* values, uint16_t bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen(values, bits)), 16));
}
inline __m512 from_fp16(const uint16_t* values, uint16_t bits) { return _mm512_cvtph_ps(sixteen(values, bits)); }
inline __m512 from_fp32(const float* values, uint16_t bits) {
  return _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(values));
}
inline __m512 from_int8(const int8_t* values, uint16_t bits) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_expand_epi8(bits, _mm_loadu_si128((const __m128i*)values))));
}

// 16-bit values to the same kind: moved, not converted.
struct Moved {
  typedef uint16_t Value;
  typedef uint32_t Bits;
  typedef __m512i Weights;
  static int64_t count(Bits bits) { return _mm_popcnt_u32(bits); }
  static Weights expand(const Value* values, Bits bits) {
    return _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
  }
  static Weights scale(Weights weights, float) { return weights; }
  static void store(void* dense, int32_t, Weights weights, int64_t n) {
    if (n == 32) return _mm512_storeu_si512(dense, weights);
    _mm512_mask_storeu_epi16(dense, (__mmask32)((1ull << n) - 1), weights);
  }
};

void arrange(const Matrix* matrix, float* x, int64_t length) {
  const int64_t parts = matrix->kind == BF16 ? 2 : matrix->kind == INT8 ? 4 : 1;
  if (parts == 1) return;
  float part[LANES];
  for (; length > 0; x += 16 * parts, length -= 16 * parts) {
    memcpy(part, x, sizeof(float) * 16 * parts);
    for (int64_t i = 0; i < 16 * parts; i++) x[i % parts * 16 + i / parts] = part[i];
  }
}

template <class P>
void few(const Matrix* matrix, const float* x, int64_t padded, int64_t tokens, int64_t low, int64_t high,
         const Output* out) {
  int64_t token = 0;
  for (; tokens - token >= 4; token += 4) rows_product<P, 4, 4>(matrix, x + token * padded, padded, token, low, high, out);
  for (; tokens - token >= 2; token += 2) rows_product<P, 4, 2>(matrix, x + token * padded, padded, token, low, high, out);
  if (token < tokens) rows_product<P, 6, 1>(matrix, x + token * padded, padded, token, low, high, out);
}

void product(const Matrix* m, const float* x, int64_t padded, int64_t tokens, int64_t low, int64_t high,
             const Output* out) {
  switch (m->kind) {
    case BF16: return few<Bf16>(m, x, padded, tokens, low, high, out);
    case FP16: return few<Fp16>(m, x, padded, tokens, low, high, out);
    case FP32: return few<Fp32>(m, x, padded, tokens, low, high, out);
    default: return few<Int8>(m, x, padded, tokens, low, high, out);
  }
}

void expand(const Matrix* m, int64_t low, int64_t high, void* dense, int32_t kind) {
  if (m->kind == kind && kind != FP32) return rows_expand<Moved>(m, low, high, dense, kind);
  switch (m->kind) {
    case BF16: return rows_expand<Dense<uint16_t, from_bf16>>(m, low, high, dense, kind);
    case FP16: return rows_expand<Dense<uint16_t, from_fp16>>(m, low, high, dense, kind);
    case FP32: return rows_expand<Dense<float, from_fp32>>(m, low, high, dense, kind);
    default: return rows_expand<Dense<int8_t, from_int8>>(m, low, high, dense, kind);
  }
}

}  // namespace

extern const Isa avx512_isa;
const Isa avx512_isa = {"avx512", 64, arrange, product, expand};
