#include "cuda/common/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "proxyattn/error.h"

#include "common/math.h"
#include "cuda/common/check.h"

namespace proxyattn::cuda {
namespace {

constexpr int kRank = 5;
constexpr int64_t kElementBytes = 2;
constexpr int64_t kAlignment = 16;  // bytes, of bases and strides
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;

using Encoder = PFN_cuTensorMapEncodeTiled_v12000;

Encoder find_encoder(const char* op) {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  constexpr unsigned kSinceCuda = 12000;
  PROXYATTN_CUDA_CALL(
      op, cudaGetDriverEntryPointByVersion(kName, &found, kSinceCuda, cudaEnableDefault, &result));
#else  // of the runtime's own version, of which the function has one form
  PROXYATTN_CUDA_CALL(op, cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result));
#endif
  if (found == nullptr || result != cudaDriverEntryPointSuccess) {
    throw CudaError(join_message(op, ": the driver has no ", kName));
  }
  return reinterpret_cast<Encoder>(found);
}

// The driver's encoder, asked from the runtime so that nothing links against the driver library.
Encoder encoder(const char* op) {
  static const Encoder function = find_encoder(op);  // asked again if it throws
  return function;
}

// The stride of a dimension with one entry is never followed, but the map wants it valid.
int64_t stride_bytes(int64_t size, int64_t stride) {
  return size == 1 ? kAlignment : stride * kElementBytes;
}

struct Dimension {
  int64_t size;
  int64_t box;
  int64_t stride;  // bytes
};

CUtensorMap encode(const char* op,
                   const void* data,
                   DType dtype,
                   const Dimension (&dimensions)[kRank]) {
  cuuint64_t sizes[kRank];
  cuuint64_t strides[kRank];
  cuuint32_t box[kRank];
  cuuint32_t steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(dimensions[i].size);
    strides[i] = static_cast<cuuint64_t>(dimensions[i].stride);
    box[i] = static_cast<cuuint32_t>(dimensions[i].box);
    steps[i] = 1;
  }
  CUtensorMap map;
  // The innermost stride is the size of an element: the encoder wants those behind it.
  const CUresult result =
      encoder(op)(&map,
                  dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  kRank, const_cast<void*>(data), sizes, strides + 1, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw CudaError(
        join_message(op, ": cuTensorMapEncodeTiled failed with error ", static_cast<int>(result)));
  }
  return map;
}

}  // namespace

bool tensor_map_fits(const void* data, const TensorSizes& sizes, const TokenStrides& strides) {
  const auto valid = [](int64_t size, int64_t stride) {
    const int64_t bytes = stride_bytes(size, stride);
    return bytes > 0 && bytes < kMaxStrideBytes && bytes % kAlignment == 0;
  };
  return reinterpret_cast<uintptr_t>(data) % kAlignment == 0 &&
         valid(sizes.tokens, strides.token) && valid(sizes.heads, strides.head) &&
         valid(sizes.batch, strides.batch);
}

CUtensorMap make_tensor_map(const char* op,
                            const void* data,
                            DType dtype,
                            const TensorSizes& sizes,
                            const TokenStrides& strides,
                            const TensorBox& box) {
  return encode(op, data, dtype,
                {{kTensorBoxColumns, kTensorBoxColumns, kElementBytes},
                 {sizes.tokens, box.rows, stride_bytes(sizes.tokens, strides.token)},
                 {sizes.head_dim / kTensorBoxColumns, box.boxes, kTensorBoxColumns * kElementBytes},
                 {sizes.heads, 1, stride_bytes(sizes.heads, strides.head)},
                 {sizes.batch, 1, stride_bytes(sizes.batch, strides.batch)}});
}

CUtensorMap make_run_map(const char* op,
                         const void* data,
                         DType dtype,
                         const TensorSizes& sizes,
                         const TokenStrides& strides,
                         const RunBox& box) {
  // At least one, which nobody loads, as a map of nothing is not valid.
  const int64_t runs = max_of<int64_t>(1, sizes.tokens / box.run_tokens);
  const int64_t token = stride_bytes(sizes.tokens, strides.token);
  return encode(op, data, dtype,
                {{sizes.head_dim, kTensorBoxColumns, kElementBytes},
                 {runs, box.runs, box.run_tokens * token},
                 {box.run_tokens + box.starts - 1, box.run_tokens, token},
                 {sizes.heads, 1, stride_bytes(sizes.heads, strides.head)},
                 {sizes.batch, 1, stride_bytes(sizes.batch, strides.batch)}});
}

}  // namespace proxyattn::cuda
