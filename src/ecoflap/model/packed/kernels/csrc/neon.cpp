// NEON of 64-bit Arm: a table tells for each byte of the mask where 8 values go.
#include <arm_neon.h>

#include "product.h"

namespace {

struct Tables {
  uint8_t bytes[256][8];       // packed bytes -> 8 lanes; 255 (zero) where there is none
  uint8_t words[256][16];      // packed 16-bit values -> 8 lanes
  uint8_t wide[2][256][16];    // packed 32-bit values -> the lower and the upper 4 lanes
  constexpr Tables() : bytes{}, words{}, wide{} {
    for (int bits = 0; bits < 256; bits++)
      for (int lane = 0, n = 0; lane < 8; lane++) {
        bool set = bits >> lane & 1;
        bytes[bits][lane] = set ? (uint8_t)n : 255;
        for (int byte = 0; byte < 2; byte++) words[bits][2 * lane + byte] = set ? (uint8_t)(2 * n + byte) : 255;
        for (int byte = 0; byte < 4; byte++)
          wide[lane / 4][bits][lane % 4 * 4 + byte] = set ? (uint8_t)(4 * n + byte) : 255;
        n += set;
      }
  }
};
constexpr Tables TABLES;

struct Pair {
  float32x4_t low, high;
};

struct FromBf16 {
  static Pair expand(const uint16_t* values, uint8_t bits) {
    uint16x8_t lanes = vreinterpretq_u16_u8(
        vqtbl1q_u8(vreinterpretq_u8_u16(vld1q_u16(values)), vld1q_u8(TABLES.words[bits])));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(lanes), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(lanes), 16))};
  }
};
struct FromFp16 {
  static Pair expand(const uint16_t* values, uint8_t bits) {
    uint8x16_t lanes = vqtbl1q_u8(vreinterpretq_u8_u16(vld1q_u16(values)), vld1q_u8(TABLES.words[bits]));
    float16x8_t halves = vreinterpretq_f16_u8(lanes);
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))};
  }
};
struct FromFp32 {
  static Pair expand(const float* values, uint8_t bits) {
    uint8x16x2_t both = {{vreinterpretq_u8_f32(vld1q_f32(values)), vreinterpretq_u8_f32(vld1q_f32(values + 4))}};
    return {vreinterpretq_f32_u8(vqtbl2q_u8(both, vld1q_u8(TABLES.wide[0][bits]))),
            vreinterpretq_f32_u8(vqtbl2q_u8(both, vld1q_u8(TABLES.wide[1][bits])))};
  }
};
struct FromInt8 {
  static Pair expand(const int8_t* values, uint8_t bits) {
    int8x8_t packed = vld1_s8(values);
    int16x8_t lanes = vmovl_s8(vtbl1_s8(packed, vreinterpret_s8_u8(vld1_u8(TABLES.bytes[bits]))));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(lanes))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(lanes)))};
  }
};

template <class V, class Expand>
struct Floats {
  typedef V Value;
  typedef uint8_t Bits;
  typedef float32x4_t Sum;
  typedef Pair Weights;
  static constexpr float ONE = 1;
  static constexpr bool DECODES = false;
  static Sum zero() { return vdupq_n_f32(0); }
  static int64_t count(Bits bits) { return __builtin_popcount(bits); }
  static Weights expand(const Value* values, Bits bits) { return Expand::expand(values, bits); }
  static Sum add(Sum sum, Weights weights, const float* x) {
    return vfmaq_f32(vfmaq_f32(sum, weights.low, vld1q_f32(x)), weights.high, vld1q_f32(x + 4));
  }
  static Sum scaled(Sum total, Sum sum, float scale) { return vfmaq_n_f32(total, sum, scale); }
  static float total(Sum sum) { return vaddvq_f32(sum); }
  static Weights scale(Weights weights, float scale) {
    return {vmulq_n_f32(weights.low, scale), vmulq_n_f32(weights.high, scale)};
  }
  static void store(void* dense, int32_t kind, Weights weights, int64_t n) {
    float lanes[8];
    vst1q_f32(lanes, weights.low);
    vst1q_f32(lanes + 4, weights.high);
    for (int64_t i = 0; i < n; i++) put_number(dense, kind, i, lanes[i]);
  }
};

// int4, 64 columns a step: codes become bytes, those the lanes of int8.
struct Int4 : Floats<int8_t, FromInt8> {
  typedef Floats<int8_t, FromInt8> Part;
  typedef uint8_t Value;
  typedef uint64_t Bits;
  struct Weights {
    Pair at[8];
  };
  static int64_t count(Bits bits) { return (__builtin_popcountll(bits) + 1) / 2; }
  static Weights expand(const Value* values, Bits bits) {
    int8_t bytes[64 + 8] = {0};  // a load of 8 may begin behind the last one
    for (int half = 0; half < 2; half++) {
      uint8x16_t pairs = vld1q_u8(values + 16 * half);
      uint8x16x2_t codes = vzipq_u8(vandq_u8(pairs, vdupq_n_u8(15)), vshrq_n_u8(pairs, 4));
      for (int part = 0; part < 2; part++)  // 2 c - 15
        vst1q_s8(bytes + 32 * half + 16 * part,
                 vsubq_s8(vreinterpretq_s8_u8(vshlq_n_u8(codes.val[part], 1)), vdupq_n_s8(15)));
    }
    Weights found;
    const int8_t* at = bytes;
    for (int part = 0; part < 8; part++, bits >>= 8) {
      found.at[part] = FromInt8::expand(at, (uint8_t)bits);
      at += __builtin_popcount((uint8_t)bits);
    }
    return found;
  }
  static Sum add(Sum sum, const Weights& weights, const float* x) {
    for (int part = 0; part < 8; part++) sum = Part::add(sum, weights.at[part], x + 8 * part);
    return sum;
  }
  static Weights scale(Weights weights, float scale) {
    for (Pair& part : weights.at) part = Part::scale(part, scale);
    return weights;
  }
  static void store(void* dense, int32_t kind, const Weights& weights, int64_t n) {
    char* to = (char*)dense;
    for (int i = 0; i < 8 && n > 0; i++, n -= 8, to += 8 * size_of(kind))
      Part::store(to, kind, weights.at[i], n < 8 ? n : 8);
  }
};

void arrange(const Matrix*, float*, int64_t) {}

template <class V, class Expand>
void few(const Matrix* matrix, const float* x, int64_t padded, int64_t tokens, int64_t low, int64_t high,
         const Output* out) {
  typedef Floats<V, Expand> P;
  tokens_product<P, 0, 4, 4, P, 4>(matrix, x, padded, tokens, low, high, out);
}

void product(const Matrix* m, const float* x, int64_t padded, int64_t tokens, int64_t low, int64_t high,
             const Output* out) {
  switch (m->kind) {
    case BF16: return few<uint16_t, FromBf16>(m, x, padded, tokens, low, high, out);
    case FP16: return few<uint16_t, FromFp16>(m, x, padded, tokens, low, high, out);
    case FP32: return few<float, FromFp32>(m, x, padded, tokens, low, high, out);
    case INT8: return few<int8_t, FromInt8>(m, x, padded, tokens, low, high, out);
    default: return tokens_product<Int4, 0, 1, 2, Int4, 2>(m, x, padded, tokens, low, high, out);
  }
}

void expand(const Matrix* m, int64_t low, int64_t high, void* dense, int32_t kind) {
  switch (m->kind) {
    case BF16: return rows_expand<Floats<uint16_t, FromBf16>>(m, low, high, dense, kind);
    case FP16: return rows_expand<Floats<uint16_t, FromFp16>>(m, low, high, dense, kind);
    case FP32: return rows_expand<Floats<float, FromFp32>>(m, low, high, dense, kind);
    case INT8: return rows_expand<Floats<int8_t, FromInt8>>(m, low, high, dense, kind);
    default: return rows_expand<Int4>(m, low, high, dense, kind);
  }
}

}  // namespace

extern const Isa neon_isa;
const Isa neon_isa = {"neon", 24, nullptr, arrange, product, expand};
