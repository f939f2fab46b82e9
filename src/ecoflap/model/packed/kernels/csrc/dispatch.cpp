#include "dispatch.h"

#include <stdlib.h>
#if defined(ECOFLAP_AVX512)
#include <cpuid.h>
#endif

#include "numbers.h"

namespace {

const Isa* best() {
#if defined(ECOFLAP_AVX2)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
              __builtin_cpu_supports("popcnt");
#endif
#if defined(ECOFLAP_AVX512)
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2"))
    return &avx512_isa;
#endif
#if defined(ECOFLAP_AVX2)
  if (avx2) return &avx2_isa;
#endif
#if defined(ECOFLAP_NEON)
  return &neon_isa;
#endif
  return &scalar_isa;
}

const Isa* chosen = nullptr;

const Isa* isa() {
  if (!chosen) chosen = best();
  return chosen;
}

struct Buffer {  // grows, and is kept for the thread's next call: fresh pages would cost more than the product
  void* memory = nullptr;
  size_t size = 0;
  ~Buffer() { free(memory); }
  void* room(size_t wanted) {
    if (wanted > size) {
      free(memory);
      memory = aligned_alloc(64, (wanted + 63) / 64 * 64);
      size = memory ? wanted : 0;
    }
    return memory;
  }
};
thread_local Buffer buffer, scratch;

bool fits(const Matrix* m) {
  return m->rows >= 0 && m->columns > 0 && m->count >= 0 && m->mask_bytes == (m->columns + 7) / 8 && m->group > 0 &&
         m->groups == (m->scales ? (m->columns + m->group - 1) / m->group : 1) && m->kind >= BF16 && m->kind <= INT4 &&
         (m->kind >= INT8) == (m->scales != nullptr);
}

// Index of the first value of the rows that end within AHEAD bytes of the last value.
int64_t tail_offset(const Matrix* m) {
  int64_t safe = m->count - AHEAD / size_of(m->kind), low = 0, high = m->rows;
  while (low < high) {
    int64_t middle = low + (high - low) / 2, end = middle + 1 < m->rows ? m->offsets[middle + 1] : m->count;
    if (end > safe) high = middle; else low = middle + 1;
  }
  return low < m->rows ? m->offsets[low] : m->count;
}

size_t tail_bytes(const Matrix* m) { return (size_t)((m->count - m->tail_offset) * size_of(m->kind) + 2 * AHEAD); }

void copy_tail(Matrix* m, void* room) {
  size_t bytes = (size_t)((m->count - m->tail_offset) * size_of(m->kind));
  memcpy(room, (const char*)m->values + m->tail_offset * size_of(m->kind), bytes);
  memset((char*)room + bytes, 0, 2 * AHEAD);
  m->tail = room;
}

void pad(const void* x, int32_t kind, int64_t columns, int64_t padded, int64_t tokens, float* to) {
  for (int64_t token = 0; token < tokens; token++, to += padded) {
    const char* row = (const char*)x + token * columns * size_of(kind);
    if (kind == FP32) memcpy(to, row, (size_t)columns * sizeof(float));
    else if (kind == BF16) for (int64_t i = 0; i < columns; i++) to[i] = bf16_to_float(((const uint16_t*)row)[i]);
    else for (int64_t i = 0; i < columns; i++) to[i] = fp16_to_float(((const uint16_t*)row)[i]);
    memset(to + columns, 0, (size_t)(padded - columns) * sizeof(float));
  }
}

// Gives a thread's copy of the matrix its scratch memory; false, and a mark, where there is none.
bool with_scratch(const Isa* one, Matrix* own, int* failed) {
  if (!one->scratch) return true;
  size_t wanted = (size_t)one->scratch(own);
  own->scratch = scratch.room(wanted);
  if (wanted && !own->scratch) __atomic_store_n(failed, 1, __ATOMIC_RELAXED);
  return !wanted || own->scratch;
}

struct Product {
  const Isa* isa;
  const Matrix* matrix;
  const float* x;
  int64_t padded, tokens;
  const Output* out;
  int* failed;
};
void work_on_product(int64_t low, int64_t high, void* context) {
  const Product* p = (const Product*)context;
  Matrix own = *p->matrix;
  if (with_scratch(p->isa, &own, p->failed)) p->isa->product(&own, p->x, p->padded, p->tokens, low, high, p->out);
}

struct Expansion {
  const Isa* isa;
  const Matrix* matrix;
  int64_t first;
  char* dense;
  int32_t kind;
  int* failed;
};
void work_on_expansion(int64_t low, int64_t high, void* context) {
  const Expansion* e = (const Expansion*)context;
  char* to = e->dense + low * e->matrix->columns * size_of(e->kind);
  Matrix own = *e->matrix;
  if (!with_scratch(e->isa, &own, e->failed)) return;
  e->isa->expand(&own, e->first + low, e->first + high, to, e->kind);
}

int64_t grain(int64_t columns) { return 32768 / columns + 1; }

}  // namespace

extern "C" {

const char* ecoflap_isa(void) { return isa()->name; }

int ecoflap_choose(const char* name) {
  const Isa* all[] = {
#if defined(ECOFLAP_AVX512)
      best() == &avx512_isa ? &avx512_isa : &scalar_isa,
#endif
#if defined(ECOFLAP_AVX2)
      best() != &scalar_isa ? &avx2_isa : &scalar_isa,
#endif
#if defined(ECOFLAP_NEON)
      &neon_isa,
#endif
      &scalar_isa};
  for (const Isa* one : all)
    if (!strcmp(one->name, name)) {
      chosen = one;
      return 0;
    }
  return 1;
}

int64_t ecoflap_most_tokens(void) { return isa()->most_tokens; }

int ecoflap_bf16_products(void) {
#if defined(ECOFLAP_AVX512)
  // Intel's matrix unit, or AMD's processors. Intel's vector products of bfloat16 alone are slower than float's.
  unsigned a, b, c, d;
  bool matrix_unit = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  return isa() == &avx512_isa && (matrix_unit || (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16")));
#else
  return 0;
#endif
}

int ecoflap_product(const Matrix* matrix, const void* x, int64_t tokens, const Output* out, Threads threads) {
  if (!fits(matrix) || tokens < 0 || out->kind < BF16 || out->kind > FP32) return 1;
  if (!tokens || !matrix->rows) return 0;
  Matrix whole = *matrix;
  int failed = 0;
  Product p = {isa(), &whole, nullptr, (whole.columns + LANES - 1) / LANES * LANES, tokens, out, &failed};
  whole.tail_offset = tail_offset(&whole);
  size_t bytes = (size_t)(p.padded * tokens) * sizeof(float) + 64;
  char* room = (char*)buffer.room(bytes + tail_bytes(&whole));
  if (!room) return 2;
  pad(x, out->kind, whole.columns, p.padded, tokens, (float*)room);
  p.isa->arrange(&whole, (float*)room, p.padded * tokens);
  copy_tail(&whole, room + bytes);
  p.x = (const float*)room;
  threads(whole.rows, grain(whole.columns), work_on_product, &p);
  return failed ? 2 : 0;
}

int ecoflap_expand(const Matrix* matrix, int64_t low, int64_t high, void* dense, int32_t kind, Threads threads) {
  if (!fits(matrix) || low < 0 || high > matrix->rows || kind < BF16 || kind > FP32) return 1;
  if (low >= high) return 0;
  Matrix whole = *matrix;
  whole.tail_offset = tail_offset(&whole);
  void* room = buffer.room(tail_bytes(&whole));
  if (!room) return 2;
  copy_tail(&whole, room);
  int failed = 0;
  Expansion e = {isa(), &whole, low, (char*)dense, kind, &failed};
  threads(high - low, grain(whole.columns), work_on_expansion, &e);
  return failed ? 2 : 0;
}
}
