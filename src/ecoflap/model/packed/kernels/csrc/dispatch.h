// Choice of the instruction set, checks of sizes, threads.
#pragma once
#include "kernels.h"

// Runs work(context, low, high) over [0, count) in parts of at least `grain`.
typedef void (*Work)(int64_t low, int64_t high, void* context);
typedef void (*Threads)(int64_t count, int64_t grain, Work work, void* context);

extern "C" {
#define ECOFLAP_API __attribute__((visibility("default")))
// "avx512", "avx2", "neon" or "scalar": the best that this processor has, or what ecoflap_choose set.
ECOFLAP_API const char* ecoflap_isa(void);
// Take another instruction set, for tests; 0, or 1 where this processor or build has none of that name.
ECOFLAP_API int ecoflap_choose(const char* name);
// y (tokens, rows) = x (tokens, columns) Wᵀ + bias ; 0, 1 (sizes), 2 (no memory).
int ecoflap_product(const Matrix* matrix, const void* x, int64_t tokens, const Output* out, Threads threads);
// Rows [low, high) to a dense (high - low, columns) in kind; 0, 1 or 2.
int ecoflap_expand(const Matrix* matrix, int64_t low, int64_t high, void* dense, int32_t kind, Threads threads);
// Tokens up to which the product is the better way; for more, dense products of unpacked tiles are.
ECOFLAP_API int64_t ecoflap_most_tokens(void);
// Whether dense bfloat16 products are fast here, so that unpacked tiles may stay bfloat16.
ECOFLAP_API int ecoflap_bf16_products(void);
}
