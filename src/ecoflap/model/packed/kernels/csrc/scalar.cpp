// Plain C++ for every processor: one non-zero after the other.
#include "product.h"

namespace {

void arrange(const Matrix*, float*, int64_t) {}

// Codes of 4 bits: `half` counts halves of a byte, and a block of columns begins with a whole byte.
inline float value_at(const Matrix* m, int64_t index) {
  return m->kind == INT4 ? (float)code_at(m->values, index) : number(m->values, m->kind, index);
}
inline int64_t block_begins(int64_t half, int64_t byte) { return byte % (BLOCK / 8) ? half : (half + 1) / 2 * 2; }

void product(const Matrix* m, const float* x, int64_t padded, int64_t tokens, int64_t low, int64_t high,
             const Output* out) {
  for (int64_t row = low; row < high; row++)
    for (int64_t token = 0; token < tokens; token++) {
      const float* at = x + token * padded;
      const uint8_t* mask = m->mask + row * m->mask_bytes;
      int64_t index = m->offsets[row] * (m->kind == INT4 ? 2 : 1);
      float total = 0;
      for (int64_t group = 0; group < m->groups; group++) {
        int64_t byte = group * m->group / 8, end = (group + 1) * m->group / 8;
        float sum = 0;
        for (end = end < m->mask_bytes ? end : m->mask_bytes; byte < end; byte++) {
          if (m->kind == INT4) index = block_begins(index, byte);
          for (unsigned bits = mask[byte]; bits; bits &= bits - 1)
            sum += value_at(m, index++) * at[byte * 8 + __builtin_ctz(bits)];
        }
        total += m->scales ? sum * m->scales[row * m->groups + group] : sum;
      }
      put_result(out, m->rows, token, row, total);
    }
}

void expand(const Matrix* m, int64_t low, int64_t high, void* dense, int32_t kind) {
  memset(dense, 0, (size_t)((high - low) * m->columns * size_of(kind)));
  for (int64_t row = low; row < high; row++) {
    const uint8_t* mask = m->mask + row * m->mask_bytes;
    int64_t index = m->offsets[row] * (m->kind == INT4 ? 2 : 1), first = (row - low) * m->columns;
    for (int64_t byte = 0; byte < m->mask_bytes; byte++) {
      if (m->kind == INT4) index = block_begins(index, byte);
      for (unsigned bits = mask[byte]; bits; bits &= bits - 1) {
        int64_t column = byte * 8 + __builtin_ctz(bits);
        float value = value_at(m, index++);
        if (m->scales) value *= m->scales[row * m->groups + column / m->group];
        put_number(dense, kind, first + column, value);
      }
    }
  }
}

}  // namespace

extern const Isa scalar_isa;
const Isa scalar_isa = {"scalar", 16, nullptr, arrange, product, expand};
