// 16-bit numbers to float and back, rounded to nearest, ties to even. Internal to each file: no code that one file's
// flags produced may be shared with another's.
#pragma once
#include <string.h>

#include "kernels.h"

namespace {

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float bf16_to_float(uint16_t value) { return from_bits((uint32_t)value << 16); }

inline uint16_t float_to_bf16(float value) {
  uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);  // NaN stays NaN
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float fp16_to_float(uint16_t value) {
  uint32_t sign = (uint32_t)(value & 0x8000) << 16, rest = value & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // An exponent that is 112 too small, mended by a product that is exact for subnormal numbers, too.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000)));
}

inline uint16_t float_to_fp16(float value) {
  uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);                   // rounds to infinity
  if (size < 0x38800000)                                                      // subnormal: one sum rounds it
    return (uint16_t)(sign | (to_bits(from_bits(size) + 0.5f) - 0x3f000000));
  size -= 112u << 23;
  return (uint16_t)(sign | (size + 0xfff + (size >> 13 & 1)) >> 13);
}

inline float number(const void* values, int32_t kind, int64_t index) {
  switch (kind) {
    case BF16: return bf16_to_float(((const uint16_t*)values)[index]);
    case FP16: return fp16_to_float(((const uint16_t*)values)[index]);
    case FP32: return ((const float*)values)[index];
    default: return (float)((const int8_t*)values)[index];
  }
}

inline void put_number(void* values, int32_t kind, int64_t index, float value) {
  switch (kind) {
    case BF16: ((uint16_t*)values)[index] = float_to_bf16(value); break;
    case FP16: ((uint16_t*)values)[index] = float_to_fp16(value); break;
    default: ((float*)values)[index] = value;
  }
}

inline int code_at(const void* values, int64_t half) {
  return 2 * (((const uint8_t*)values)[half / 2] >> half % 2 * 4 & 15) - 15;
}

inline int64_t size_of(int32_t kind) { return kind >= INT8 ? 1 : kind == FP32 ? 4 : 2; }

inline void put_result(const Output* out, int64_t rows, int64_t token, int64_t row, float sum) {
  if (out->bias) sum += number(out->bias, out->bias_kind, row);
  put_number(out->y, out->kind, token * rows + row, sum);
}

}  // namespace
