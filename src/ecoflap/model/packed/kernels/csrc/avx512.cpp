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
  static constexpr bool DECODES = false;
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
    return lanes(_mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(values)));
  }
  static Weights lanes(__m512i four) {
    __m512i top = _mm512_set1_epi32((int)0xff000000);
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

// The numbers of 64 codes of 4 bits, as bytes.
inline __m512i numbers(const uint8_t* values) {
  __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)values));
  __m512i codes = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
  const __m128i table = _mm_setr_epi8(-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}

// int4, 64 columns a step: a byte holds 16 and a code, or zero; its lowest five bits choose one of 32 numbers.
struct Int4 : Int8 {
  typedef uint8_t Value;
  static constexpr float ONE = 1;
  static int64_t count(Bits bits) { return (_mm_popcnt_u64(bits) + 1) / 2; }
  static Weights expand(const Value* values, Bits bits) {
    __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)values));
    __m512i codes = _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi16(pairs, 4), _mm512_set1_epi8(16), 0xfe);
    __m512i four = _mm512_maskz_expand_epi8(bits, codes);
    const __m512 levels = _mm512_setr_ps(-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m512 none = _mm512_setzero_ps();
    return {{_mm512_permutex2var_ps(none, four, levels), _mm512_permutex2var_ps(none, _mm512_srli_epi32(four, 8), levels),
             _mm512_permutex2var_ps(none, _mm512_srli_epi32(four, 16), levels),
             _mm512_permutex2var_ps(none, _mm512_srli_epi32(four, 24), levels)}};
  }
  static Sum scaled(Sum total, Sum sum, float scale) { return _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), total); }
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
  static constexpr bool DECODES = false;
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

struct DenseInt4 {  // 64 columns a step
  typedef uint8_t Value;
  static constexpr bool DECODES = false;
  typedef uint64_t Bits;
  struct Weights {
    __m512 at[4];
  };
  typedef Dense<int8_t, from_int8> Part;
  static int64_t count(Bits bits) { return Int4::count(bits); }
  static Weights expand(const Value* values, Bits bits) {
    __m512i all = _mm512_maskz_expand_epi8(bits, numbers(values));
    return {{part(_mm512_extracti32x4_epi32(all, 0)), part(_mm512_extracti32x4_epi32(all, 1)),
             part(_mm512_extracti32x4_epi32(all, 2)), part(_mm512_extracti32x4_epi32(all, 3))}};
  }
  static __m512 part(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
  static Weights scale(Weights weights, float scale) {
    for (__m512& part : weights.at) part = Part::scale(part, scale);
    return weights;
  }
  static void store(void* dense, int32_t kind, Weights weights, int64_t n) {
    char* to = (char*)dense;
    for (int i = 0; i < 4 && n > 0; i++, n -= 16, to += 16 * size_of(kind))
      Part::store(to, kind, weights.at[i], n < 16 ? n : 16);
  }
};

// 16-bit values to the same kind: moved, not converted.
struct Moved {
  typedef uint16_t Value;
  static constexpr bool DECODES = false;
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
  const int64_t parts = matrix->kind == BF16 ? 2 : matrix->kind >= INT8 ? 4 : 1;
  if (parts == 1) return;
  float part[LANES];
  for (; length > 0; x += 16 * parts, length -= 16 * parts) {
    memcpy(part, x, sizeof(float) * 16 * parts);
    for (int64_t i = 0; i < 16 * parts; i++) x[i % parts * 16 + i / parts] = part[i];
  }
}

void product(const Matrix* m, const float* x, int64_t padded, int64_t tokens, int64_t low, int64_t high,
             const Output* out) {
  switch (m->kind) {
    case BF16: return tokens_product<Bf16, 0, 4, 4, Bf16, 6>(m, x, padded, tokens, low, high, out);
    case FP16: return tokens_product<Fp16, 0, 4, 4, Fp16, 6>(m, x, padded, tokens, low, high, out);
    case FP32: return tokens_product<Fp32, 3, 4, 4, Fp32, 6>(m, x, padded, tokens, low, high, out);
    case INT8: return tokens_product<Int8, 0, 4, 4, Int8, 6>(m, x, padded, tokens, low, high, out);
    default: return tokens_product<Int4, 0, 4, 4, Int4, 6>(m, x, padded, tokens, low, high, out);
  }
}

void expand(const Matrix* m, int64_t low, int64_t high, void* dense, int32_t kind) {
  if (m->kind == kind && kind != FP32) return rows_expand<Moved>(m, low, high, dense, kind);
  switch (m->kind) {
    case BF16: return rows_expand<Dense<uint16_t, from_bf16>>(m, low, high, dense, kind);
    case FP16: return rows_expand<Dense<uint16_t, from_fp16>>(m, low, high, dense, kind);
    case FP32: return rows_expand<Dense<float, from_fp32>>(m, low, high, dense, kind);
    case INT8: return rows_expand<Dense<int8_t, from_int8>>(m, low, high, dense, kind);
    default: return rows_expand<DenseInt4>(m, low, high, dense, kind);
  }
}

}  // namespace

extern const Isa avx512_isa;
const Isa avx512_isa = {"avx512", 64, nullptr, arrange, product, expand};
