// Every instruction set of this build against the product in double, on memory that ends with the last byte, so that the
// address sanitiser sees a read too far. Built and run by `make kernels-check`, which also runs it as 64-bit Arm.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <random>
#include <vector>

#include "dispatch.h"
#include "numbers.h"

template <class T>
struct Exact {  // its own allocation, exactly as long
  std::unique_ptr<T[]> data;
  explicit Exact(const std::vector<T>& from) : data(new T[from.size()]) {
    for (size_t i = 0; i < from.size(); i++) data[i] = from[i];
  }
};

static void threads(int64_t count, int64_t, Work work, void* context) {  // uneven parts, as threads have
  int64_t third = count / 3;
  if (third) work(0, third, context);
  work(third, count, context);
}

static std::mt19937 generator(0);
static double uniform() { return std::uniform_real_distribution<double>(-1, 1)(generator); }

static int failures = 0;

static void check(const char* isa, int64_t rows, int64_t columns, double sparsity, int32_t kind, int64_t group,
                  int32_t x_kind, int64_t tokens) {
  int64_t mask_bytes = (columns + 7) / 8, groups = kind >= INT8 ? (columns + group - 1) / group : 1;
  std::vector<uint8_t> mask((size_t)(rows * mask_bytes)), values;
  std::vector<int64_t> offsets;
  std::vector<double> dense((size_t)(rows * columns));
  std::vector<float> scales;
  int64_t count = 0;
  for (int64_t row = 0; row < rows; row++) {
    offsets.push_back(count);
    for (int64_t g = 0; kind >= INT8 && g < groups; g++) scales.push_back((float)(0.01 + fabs(uniform())));
    bool second = false;  // a code of 4 bits goes into the upper half of the last byte
    for (int64_t column = 0; column < columns; column++) {
      if (column % BLOCK == 0) second = false;
      if ((uniform() + 1) / 2 < sparsity) continue;
      mask[(size_t)(row * mask_bytes + column / 8)] |= (uint8_t)(1 << column % 8);
      uint8_t bytes[4];
      double value;
      if (kind == INT4) {
        int code = (int)(generator() % 16);
        dense[(size_t)(row * columns + column)] = (2 * code - 15) * (double)scales[(size_t)(row * groups + column / group)];
        if (second) values.back() = (uint8_t)(values.back() | code << 4);
        else values.push_back((uint8_t)code), count++;
        second = !second;
        continue;
      }
      if (kind == INT8) {
        int8_t q = (int8_t)(1 + (int)(126 * fabs(uniform()))) * (uniform() < 0 ? -1 : 1);
        memcpy(bytes, &q, 1);
        value = (double)q * scales[(size_t)(row * groups + column / group)];
      } else {
        put_number(bytes, kind, 0, (float)uniform());
        value = number(bytes, kind, 0);
      }
      values.insert(values.end(), bytes, bytes + size_of(kind));
      dense[(size_t)(row * columns + column)] = value;
      count++;
    }
  }
  std::vector<uint8_t> x((size_t)(tokens * columns * size_of(x_kind)));
  for (int64_t i = 0; i < tokens * columns; i++) put_number(x.data(), x_kind, i, (float)uniform());
  Exact<uint8_t> own_mask(mask), own_values(values), own_x(x);
  Exact<int64_t> own_offsets(offsets);
  Exact<float> own_scales(scales);
  Matrix matrix = {own_values.data.get(), own_mask.data.get(), own_offsets.data.get(),
                   kind >= INT8 ? own_scales.data.get() : nullptr, rows, columns, count, mask_bytes,
                   kind >= INT8 ? group : (columns + 63) / 64 * 64, groups, kind, nullptr, 0};
  Exact<float> y(std::vector<float>((size_t)(rows * tokens)));
  Output out = {y.data.get(), x_kind, nullptr, FP32};
  std::unique_ptr<uint8_t[]> room(new uint8_t[(size_t)(rows * tokens * size_of(x_kind))]);
  out.y = room.get();
  if (ecoflap_product(&matrix, own_x.data.get(), tokens, &out, threads)) failures++, printf("%s: refused\n", isa);
  double unit = x_kind == BF16 ? 1.0 / 256 : x_kind == FP16 ? 1.0 / 2048 : 1.0 / (1 << 24);
  for (int64_t token = 0; token < tokens; token++)
    for (int64_t row = 0; row < rows; row++) {
      double exact = 0, size = 0;
      for (int64_t c = 0; c < columns; c++) {
        double term = dense[(size_t)(row * columns + c)] * number(own_x.data.get(), x_kind, token * columns + c);
        exact += term, size += fabs(term);
      }
      double found = number(out.y, x_kind, token * rows + row), bound = size * (double)(columns + 2) / (1 << 23) + fabs(exact) * unit + 1e-6;
      if (!(fabs(found - exact) <= bound)) {
        failures++;
        printf("%s: %ld x %ld, sparsity %g, values %d, x %d, tokens %ld: %g for %g\n", isa, (long)rows, (long)columns,
               sparsity, kind, x_kind, (long)tokens, found, exact);
        return;
      }
    }
  Exact<float> tile(std::vector<float>((size_t)(rows * columns)));
  if (ecoflap_expand(&matrix, 0, rows, tile.data.get(), FP32, threads)) failures++;
  for (int64_t i = 0; i < rows * columns; i++)
    if (fabs(tile.data[(size_t)i] - dense[(size_t)i]) > 1e-6 * fabs(dense[(size_t)i])) {
      failures++;
      printf("%s: expanded %g for %g\n", isa, tile.data[(size_t)i], dense[(size_t)i]);
      return;
    }
}

static std::vector<int64_t> groups_of(int32_t kind, int64_t columns) {  // only rounded values have groups
  int64_t whole = (columns + 63) / 64 * 64;
  return kind < INT8 || whole == 64 ? std::vector<int64_t>{whole} : std::vector<int64_t>{64, whole};
}

int main() {
  const char* names[] = {"scalar", "avx2", "avx512", "neon"};
  int64_t shapes[][2] = {{1, 1}, {3, 7}, {5, 64}, {13, 65}, {17, 200}, {40, 515}, {2, 1024}};
  for (const char* isa : names) {
    if (ecoflap_choose(isa)) continue;
    for (auto& shape : shapes)
      for (double sparsity : {0.0, 0.5, 0.95, 1.0})
        for (int32_t kind : {BF16, FP16, FP32, INT8, INT4})
          for (int64_t group : groups_of(kind, shape[1]))
            for (int32_t x_kind : {BF16, FP16, FP32})
              for (int64_t tokens : {1, 2, 3, 4, 9}) check(isa, shape[0], shape[1], sparsity, kind, group, x_kind, tokens);
    printf("%s: checked\n", isa);
  }
  if (failures) printf("%d failures\n", failures);
  return failures != 0;
}
