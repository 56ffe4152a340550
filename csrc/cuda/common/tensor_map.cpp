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

// The driver's encoder, asked from the runtime so that nothing links against the driver library.
PFN_cuTensorMapEncodeTiled_v12000 encoder(const char* op) {
  static PFN_cuTensorMapEncodeTiled_v12000 function = nullptr;
  if (function == nullptr) {
    constexpr unsigned kSinceCuda = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    PROXYATTN_CUDA_CALL(
        op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSinceCuda,
                                             cudaEnableDefault, &result));
    if (found == nullptr || result != cudaDriverEntryPointSuccess) {
      throw CudaError(join_message(op, ": the driver has no cuTensorMapEncodeTiled"));
    }
    function = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }
  return function;
}

// The stride of a dimension with one entry is never followed, but the map wants it valid.
int64_t stride_bytes(int64_t size, int64_t stride) {
  return size == 1 ? kAlignment : stride * kElementBytes;
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
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t dims[kRank] = {kTensorBoxColumns, size(sizes.tokens),
                                  size(sizes.head_dim / kTensorBoxColumns), size(sizes.heads),
                                  size(sizes.batch)};
  const cuuint64_t byte_strides[kRank - 1] = {size(stride_bytes(sizes.tokens, strides.token)),
                                              kTensorBoxColumns * kElementBytes,
                                              size(stride_bytes(sizes.heads, strides.head)),
                                              size(stride_bytes(sizes.batch, strides.batch))};
  const cuuint32_t box_dims[kRank] = {kTensorBoxColumns, static_cast<cuuint32_t>(box.rows),
                                      static_cast<cuuint32_t>(box.boxes), 1, 1};
  const cuuint32_t steps[kRank] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encoder(op)(&map,
                  dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  kRank, const_cast<void*>(data), dims, byte_strides, box_dims, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw CudaError(
        join_message(op, ": cuTensorMapEncodeTiled failed with error ", static_cast<int>(result)));
  }
  return map;
}

}  // namespace proxyattn::cuda
