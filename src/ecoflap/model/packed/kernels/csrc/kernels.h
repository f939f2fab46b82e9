// Products with packed weights: what all instruction sets share. No header of torch or Python, no C++ library.
//
// A weight of R rows and C columns is stored as its non-zeros, row by row, and one bit a weight (format.py). Whoever calls
// has checked that mask, offsets and values agree (checks.py): here they are trusted.
#pragma once
#include <stdint.h>

// INT4: codes of 4 bits, two to a byte, the lower half first; those of BLOCK columns begin with a byte of their own.
// A code c is the number 2 c - 15. Counts and offsets of such values are in bytes.
enum Kind { BF16 = 0, FP16 = 1, FP32 = 2, INT8 = 3, INT4 = 4 };
enum { BLOCK = 64 };

struct Matrix {
  const void* values;       // (count)
  const uint8_t* mask;      // (rows, mask_bytes)
  const int64_t* offsets;   // (rows)
  const float* scales;      // (rows, groups), INT8 and INT4 alone
  int64_t rows, columns, count, mask_bytes;
  int64_t group;            // columns that share a scale, a multiple of 64, or not less than columns
  int64_t groups;
  int32_t kind;             // of the values
  const void* tail;         // copy of the values from tail_offset on, with AHEAD bytes behind them (prepare_tail)
  int64_t tail_offset;
  void* scratch;            // as many bytes as the instruction set wants, the thread's own
};

// What a product writes: y[token * rows + row] = sum + bias[row], rounded once.
struct Output {
  void* y;
  int32_t kind;             // BF16, FP16 or FP32
  const void* bias;         // (rows) or null
  int32_t bias_kind;
};

enum { AHEAD = 64 };        // bytes behind a row's values that a load may touch
enum { LANES = 64 };        // rows of x are padded with zeros to a multiple of so many columns

// One instruction set. x is (tokens, padded) float, zeros behind the last column, in the order that arrange makes.
struct Isa {
  const char* name;
  int64_t most_tokens;      // up to which products beat unpacking tiles for dense ones
  int64_t (*scratch)(const Matrix*);  // bytes that product and expand write to; null: none
  void (*arrange)(const Matrix*, float* x, int64_t length);
  void (*product)(const Matrix*, const float* x, int64_t padded, int64_t tokens, int64_t low, int64_t high, const Output*);
  void (*expand)(const Matrix*, int64_t low, int64_t high, void* dense, int32_t kind);  // rows to (high - low, columns)
};

extern const Isa scalar_isa;
#ifdef ECOFLAP_AVX2
extern const Isa avx2_isa;
#endif
#ifdef ECOFLAP_AVX512
extern const Isa avx512_isa;
#endif
#ifdef ECOFLAP_NEON
extern const Isa neon_isa;
#endif
