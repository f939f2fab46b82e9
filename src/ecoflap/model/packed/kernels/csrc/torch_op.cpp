// Registers the kernels as operators of torch through its stable C interface (torch 2.10 and newer). The few functions
// that we need are declared here and looked up in the running torch: the build needs no torch, and one binary serves
// every version of torch and Python.
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace {

typedef uint64_t Value;  // an argument on torch's stable stack: a number, or a handle that its receiver owns
typedef void* Tensor;
typedef void* Library;
typedef void (*Kernel)(Value* stack, uint64_t arguments, uint64_t results);
const uint64_t BUILT_FOR = 0x020a000000000000;  // torch 2.10

struct Torch {
  int32_t (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
  int32_t (*library_init_impl)(const char*, const char*, const char*, uint32_t, Library*);
  int32_t (*library_impl)(Library, const char*, Kernel, uint64_t);
  int32_t (*call)(const char*, const char*, Value*, uint64_t);
  int32_t (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor*);
  int32_t (*delete_tensor)(Tensor);
  int32_t (*data)(Tensor, void**);
  int32_t (*dim)(Tensor, int64_t*);
  int32_t (*numel)(Tensor, int64_t*);
  int32_t (*sizes)(Tensor, int64_t**);
  int32_t (*dtype)(Tensor, int32_t*);
  int32_t (*is_contiguous)(Tensor, bool*);
  int32_t bf16, fp16, fp32, int8, int64, uint8;
} torch;

[[noreturn]] void fail(const char* what) { throw std::runtime_error(std::string("ecoflap: ") + what); }
void check(int32_t error) {
  if (error) fail("torch refused a call; its own message stands above");
}

struct Handles {  // frees the arguments that we own
  Value* stack;
  uint64_t count;
  ~Handles() {
    for (uint64_t i = 0; i < count; i++) torch.delete_tensor((Tensor)stack[i]);
  }
};

void* data(Tensor tensor) {
  void* found;
  check(torch.data(tensor, &found));
  return found;
}
int64_t numel(Tensor tensor) {
  int64_t found;
  check(torch.numel(tensor, &found));
  return found;
}
bool contiguous(Tensor tensor) {
  bool found;
  check(torch.is_contiguous(tensor, &found));
  return found;
}
int32_t dtype(Tensor tensor) {
  int32_t found;
  check(torch.dtype(tensor, &found));
  return found;
}
int32_t kind(Tensor tensor) {  // -1 where kernels have none
  int32_t found = dtype(tensor);
  if (found == torch.bf16) return BF16;
  if (found == torch.fp16) return FP16;
  if (found == torch.fp32) return FP32;
  return found == torch.int8 ? INT8 : found == torch.uint8 ? INT4 : -1;
}
bool is_float(int32_t kind) { return kind >= BF16 && kind <= FP32; }
int64_t columns(Tensor tensor) {
  int64_t dim, *sizes;
  check(torch.dim(tensor, &dim));
  check(torch.sizes(tensor, &sizes));
  return dim ? sizes[dim - 1] : 0;
}

void threads(int64_t count, int64_t grain, Work work, void* context) {
  check(torch.parallel_for(0, count, grain, work, context));
}

// False where the parts are of a kind that kernels don't read; throws where their sizes disagree.
bool matrix_of(Value* parts, int64_t width, int64_t group, Matrix* matrix) {
  Tensor values = (Tensor)parts[0], mask = (Tensor)parts[1], offsets = (Tensor)parts[2], scales = (Tensor)parts[3];
  int64_t scale_count = numel(scales);
  *matrix = {};
  matrix->kind = kind(values);
  if (matrix->kind < 0 || !contiguous(values) || !contiguous(mask) || !contiguous(offsets) || !contiguous(scales))
    return false;
  matrix->rows = numel(offsets);
  matrix->columns = width;
  matrix->count = numel(values);
  matrix->mask_bytes = (width + 7) / 8;
  matrix->group = group > 0 && group < width ? group : (width > 0 ? (width + 63) / 64 * 64 : 64);
  matrix->groups = scale_count ? (width + matrix->group - 1) / matrix->group : 1;
  if (numel(mask) != matrix->rows * matrix->mask_bytes || dtype(mask) != torch.uint8 || dtype(offsets) != torch.int64)
    fail("the packed weight's parts do not fit the input");
  if (scale_count && (scale_count != matrix->rows * matrix->groups || dtype(scales) != torch.fp32))
    fail("the packed weight's scales do not fit it");
  matrix->values = data(values);
  matrix->mask = (const uint8_t*)data(mask);
  matrix->offsets = (const int64_t*)data(offsets);
  matrix->scales = scale_count ? (const float*)data(scales) : nullptr;
  return true;
}

void told(int code) {
  if (code == 1) fail("the packed weight's parts do not fit each other");
  if (code == 2) fail("out of memory");
}

// packed_linear(x, compressed, bitmask, row_offsets, scales, bias, group_size) -> y
void packed_linear(Value* stack, uint64_t, uint64_t) {
  Tensor x = (Tensor)stack[0], bias = (Tensor)stack[5];
  int64_t width = columns(x), tokens = width ? numel(x) / width : 0;
  Matrix matrix;
  int32_t x_kind = kind(x), bias_kind = kind(bias);
  bool ours = is_float(x_kind) && is_float(bias_kind) && tokens > 0 && tokens <= ecoflap_most_tokens() && contiguous(x) &&
              contiguous(bias);
  bool taken;
  {
    struct Guard {  // frees what we own if a check throws
      Value* stack;
      bool armed = true;
      ~Guard() {
        if (armed) Handles{stack, 6};
      }
    } guard{stack};
    taken = ours && matrix_of(stack + 1, width, (int64_t)stack[6], &matrix);
    guard.armed = false;
  }
  if (!taken) return check(torch.call("ecoflap::packed_linear_tiled", "", stack, BUILT_FOR));
  Tensor y = nullptr;
  {
    Handles handles{stack, 6};
    int64_t dim, *sizes, shape[64], strides[64], stride = 1;
    check(torch.dim(x, &dim));
    check(torch.sizes(x, &sizes));
    if (dim > 64) fail("more than 64 dimensions");
    if (numel(bias) && numel(bias) != matrix.rows) fail("the bias does not fit the packed weight");
    for (int64_t i = dim - 1; i >= 0; i--) {
      shape[i] = i == dim - 1 ? matrix.rows : sizes[i];
      strides[i] = stride;
      stride *= shape[i] > 1 ? shape[i] : 1;
    }
    check(torch.empty_strided(dim, shape, strides, dtype(x), 0, 0, &y));
    Output out = {data(y), x_kind, numel(bias) ? data(bias) : nullptr, bias_kind};
    if (int code = ecoflap_product(&matrix, data(x), tokens, &out, threads)) {
      torch.delete_tensor(y);
      told(code);
    }
  }
  stack[0] = (Value)y;
}

// unpack_rows(dense!, compressed, bitmask, row_offsets, scales, group_size, first): rows from `first` on
void unpack_rows(Value* stack, uint64_t, uint64_t) {
  Handles handles{stack, 5};
  Tensor dense = (Tensor)stack[0];
  Matrix matrix;
  int64_t width = columns(dense), first = (int64_t)stack[6], rows = width ? numel(dense) / width : 0;
  int32_t dense_kind = kind(dense);
  if (!contiguous(dense) || !is_float(dense_kind) || !matrix_of(stack + 1, width, (int64_t)stack[5], &matrix))
    fail("rows are unpacked into a contiguous tensor of 16- or 32-bit floats");
  told(ecoflap_expand(&matrix, first, first + rows, data(dense), dense_kind, threads));
}

template <class F>
bool find(void* library, const char* name, F* function) {
  *function = (F)dlsym(library, name);
  return *function != nullptr;
}
bool find_dtype(void* library, const char* name, int32_t* number) {
  int32_t (*function)();
  if (!find(library, name, &function)) return false;
  *number = function();
  return true;
}

}  // namespace

// Called once with the handle of libtorch_cpu. 0; 1 where this torch has no such interface.
extern "C" ECOFLAP_API int ecoflap_register(void* library) {
  bool found = find(library, "torch_parallel_for", &torch.parallel_for) &&
               find(library, "aoti_torch_library_init_impl", &torch.library_init_impl) &&
               find(library, "torch_library_impl", &torch.library_impl) &&
               find(library, "torch_call_dispatcher", &torch.call) &&
               find(library, "aoti_torch_empty_strided", &torch.empty_strided) &&
               find(library, "aoti_torch_delete_tensor_object", &torch.delete_tensor) &&
               find(library, "aoti_torch_get_data_ptr", &torch.data) &&
               find(library, "aoti_torch_get_dim", &torch.dim) && find(library, "aoti_torch_get_numel", &torch.numel) &&
               find(library, "aoti_torch_get_sizes", &torch.sizes) &&
               find(library, "aoti_torch_get_dtype", &torch.dtype) &&
               find(library, "aoti_torch_is_contiguous", &torch.is_contiguous) &&
               find_dtype(library, "aoti_torch_dtype_bfloat16", &torch.bf16) &&
               find_dtype(library, "aoti_torch_dtype_float16", &torch.fp16) &&
               find_dtype(library, "aoti_torch_dtype_float32", &torch.fp32) &&
               find_dtype(library, "aoti_torch_dtype_int8", &torch.int8) &&
               find_dtype(library, "aoti_torch_dtype_int64", &torch.int64) &&
               find_dtype(library, "aoti_torch_dtype_uint8", &torch.uint8);
  Library ours;
  if (!found || torch.library_init_impl("ecoflap", "CPU", __FILE__, __LINE__, &ours)) return 1;
  return torch.library_impl(ours, "packed_linear", packed_linear, BUILT_FOR) ||
         torch.library_impl(ours, "unpack_rows", unpack_rows, BUILT_FOR);
}
