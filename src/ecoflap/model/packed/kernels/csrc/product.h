// The product's loops, for any instruction set. A policy P tells how a step of P::STEP columns is expanded and multiplied:
//   typename P::Value           element type of the values
//   typename P::Sum             accumulator of one row and token
//   typename P::Weights         one expanded step
//   P::Bits                     integer of STEP bits
//   expand(values, bits)        the step's weights, zeros where a bit is 0; may read AHEAD bytes from `values` on
//   add(sum, weights, x)        sum + weights * x[0 .. STEP)
//   scaled(total, sum, scale)   total + sum * scale
//   total(sum)                  the lanes' sum
//   ONE                         by which weights are multiplied in the end
//   DECODES                     whether decoded(matrix, row, place) makes a row's values, for the `place`th row at once
#pragma once
#include "numbers.h"

namespace {

enum { FETCH = 1024, MASK_FETCH = 512 };  // bytes that values and masks are fetched ahead

template <class Bits>
inline Bits whole_bits_at(const uint8_t* mask) {
  Bits bits;
  memcpy(&bits, mask, sizeof(Bits));
  return bits;
}
// The step's bits; the last one of a row may have fewer bytes than Bits.
template <class Bits>
inline Bits bits_at(const uint8_t* mask, int64_t left) {
  if (left >= (int64_t)sizeof(Bits)) return whole_bits_at<Bits>(mask);  // a copy of known size is one load
  Bits bits = 0;
  memcpy(&bits, mask, (size_t)left);
  return bits;
}

// Columns [first, last) of ROWS rows, TOKENS tokens; values move on.
template <class P, int ROWS, int TOKENS>
inline void span(const uint8_t* const* mask, const typename P::Value** values, const float* x, int64_t padded,
                 int64_t first, int64_t last, int64_t mask_bytes, typename P::Sum sums[ROWS][TOKENS]) {
  constexpr int BYTES = sizeof(typename P::Bits);
  typename P::Sum kept[ROWS][TOKENS];
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++) kept[r][t] = sums[r][t];
  int64_t byte = first / 8, whole = last / 8 < mask_bytes ? last / 8 : mask_bytes, end = whole - BYTES;
  const typename P::Value* at[ROWS];
  for (int r = 0; r < ROWS; r++) at[r] = values[r];
  for (; byte <= end; byte += BYTES) {
    typename P::Weights weights[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      typename P::Bits bits = whole_bits_at<typename P::Bits>(mask[r] + byte);
      if (BYTES >= 4 || !(byte & 3)) __builtin_prefetch((const char*)at[r] + FETCH);
      if (!(byte & 63)) __builtin_prefetch(mask[r] + byte + MASK_FETCH);
      weights[r] = P::expand(at[r], bits);
      at[r] += P::count(bits);
    }
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      const float* part = x + t * padded + byte * 8;
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) kept[r][t] = P::add(kept[r][t], weights[r], part);
    }
  }
  for (; byte < whole; byte += BYTES)
    for (int r = 0; r < ROWS; r++) {
      typename P::Bits bits = bits_at<typename P::Bits>(mask[r] + byte, whole - byte);
      typename P::Weights weights = P::expand(at[r], bits);
      at[r] += P::count(bits);
      for (int t = 0; t < TOKENS; t++) kept[r][t] = P::add(kept[r][t], weights, x + t * padded + byte * 8);
    }
  for (int r = 0; r < ROWS; r++) {
    values[r] = at[r];
    for (int t = 0; t < TOKENS; t++) sums[r][t] = kept[r][t];
  }
}

// Loads overrun a row, so the matrix's last rows are read from a padded copy.
template <class Value>
inline const Value* stored_values(const Matrix* matrix, int64_t row) {
  int64_t offset = matrix->offsets[row];
  if (offset < matrix->tail_offset) return (const Value*)matrix->values + offset;
  return (const Value*)matrix->tail + (offset - matrix->tail_offset);
}
template <class P>
inline const typename P::Value* values_of(const Matrix* matrix, int64_t row, int place) {
  if constexpr (P::DECODES) return P::decoded(matrix, row, place);
  else return stored_values<typename P::Value>(matrix, row);
}

// ROWS rows at once that lie far apart, so that each reads memory in one direction for the whole call: rows side by side
// would set the hardware's prefetcher back with every row.
template <class P, int ROWS, int TOKENS>
void rows_product(const Matrix* matrix, const float* x, int64_t padded,
                  int64_t token, int64_t low, int64_t high, const Output* out) {
  const int64_t apart = (high - low) / ROWS, columns = matrix->mask_bytes * 8;
  for (int64_t i = 0; i < apart; i++) {
    const uint8_t* mask[ROWS];
    const typename P::Value* values[ROWS];
    typename P::Sum sums[ROWS][TOKENS];
    for (int r = 0; r < ROWS; r++) {
      int64_t row = low + r * apart + i;
      mask[r] = matrix->mask + row * matrix->mask_bytes;
      values[r] = values_of<P>(matrix, row, r);
      for (int t = 0; t < TOKENS; t++) sums[r][t] = P::zero();
    }
    if (matrix->groups <= 1) {
      span<P, ROWS, TOKENS>(mask, values, x, padded, 0, columns, matrix->mask_bytes, sums);
    } else {
      typename P::Sum totals[ROWS][TOKENS];
      for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) totals[r][t] = P::zero();
      for (int64_t g = 0; g < matrix->groups; g++) {
        span<P, ROWS, TOKENS>(mask, values, x, padded, g * matrix->group, (g + 1) * matrix->group, matrix->mask_bytes,
                              sums);
        for (int r = 0; r < ROWS; r++) {
          float scale = matrix->scales[(low + r * apart + i) * matrix->groups + g];
          for (int t = 0; t < TOKENS; t++) {
            totals[r][t] = P::scaled(totals[r][t], sums[r][t], scale);
            sums[r][t] = P::zero();
          }
        }
      }
      for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) sums[r][t] = totals[r][t];
    }
    for (int r = 0; r < ROWS; r++) {
      int64_t row = low + r * apart + i;
      float scale = matrix->groups > 1 ? 1.0f : matrix->scales ? matrix->scales[row] * P::ONE : P::ONE;
      for (int t = 0; t < TOKENS; t++) put_result(out, matrix->rows, token + t, row, P::total(sums[r][t]) * scale);
    }
  }
  if (ROWS > 1 && low + ROWS * apart < high)
    rows_product<P, 1, TOKENS>(matrix, x, padded, token, low + ROWS * apart, high, out);
}

// All tokens: eight (where ROWS8 is not 0), four, two and one at a time, by so many rows at once. One token has a policy
// of its own: it has registers for longer steps.
template <class Many, int ROWS8, int ROWS4, int ROWS2, class One, int ROWS1>
void tokens_product(const Matrix* matrix, const float* x, int64_t padded, int64_t tokens, int64_t low, int64_t high,
                    const Output* out) {
  int64_t token = 0;
  if constexpr (ROWS8 > 0)
    for (; tokens - token >= 8; token += 8)
      rows_product<Many, ROWS8, 8>(matrix, x + token * padded, padded, token, low, high, out);
  for (; tokens - token >= 4; token += 4)
    rows_product<Many, ROWS4, 4>(matrix, x + token * padded, padded, token, low, high, out);
  for (; tokens - token >= 2; token += 2)
    rows_product<Many, ROWS2, 2>(matrix, x + token * padded, padded, token, low, high, out);
  if (token < tokens) rows_product<One, ROWS1, 1>(matrix, x + token * padded, padded, token, low, high, out);
}

// Rows [low, high) to dense ones. A policy with float weights also has
//   scale(weights, scale)         weights * scale
//   store(dense, kind, weights, n)  the first n (at most STEP) of them, in kind, from `dense` on
template <class P>
void rows_expand(const Matrix* matrix, int64_t low, int64_t high, void* dense, int32_t kind) {
  constexpr int BYTES = sizeof(typename P::Bits), STEP = BYTES * 8;
  char* to = (char*)dense;
  for (int64_t row = low; row < high; row++) {
    const uint8_t* mask = matrix->mask + row * matrix->mask_bytes;
    const typename P::Value* values = values_of<P>(matrix, row, 0);
    for (int64_t column = 0; column < matrix->columns; column += STEP) {
      int64_t left = matrix->columns - column, byte = column / 8;
      typename P::Bits bits = bits_at<typename P::Bits>(mask + byte, matrix->mask_bytes - byte);
      typename P::Weights weights = P::expand(values, bits);
      values += P::count(bits);
      if (matrix->scales) weights = P::scale(weights, matrix->scales[row * matrix->groups + column / matrix->group]);
      P::store(to, kind, weights, left < STEP ? left : STEP);
      to += (left < STEP ? left : STEP) * size_of(kind);
    }
  }
}

}  // namespace
