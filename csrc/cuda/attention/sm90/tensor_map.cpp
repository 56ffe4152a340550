#include "cuda/attention/sm90/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "proxyattn/error.h"

#include "common/math.h"
#include "cuda/attention/sm90/config.h"
#include "cuda/common/check.h"

namespace proxyattn::cuda::sm90 {
namespace {

constexpr int kRank = 5;
constexpr int64_t kElementBytes = 2;
constexpr int64_t kAlignment = 16;                     // bytes, of bases and strides
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;  // exclusive
constexpr int64_t kMaxTokens = int64_t{1} << 30;       // coordinates are signed 32-bit
constexpr int64_t kMaxTiles = int64_t{1} << 31;        // exclusive

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

bool addressable(
    const void* data, int64_t tokens, int64_t heads, int64_t batch, const TokenStrides& strides) {
  const auto valid = [](int64_t size, int64_t stride) {
    const int64_t bytes = stride_bytes(size, stride);
    return bytes > 0 && bytes < kMaxStrideBytes && bytes % kAlignment == 0;
  };
  return reinterpret_cast<uintptr_t>(data) % kAlignment == 0 && valid(tokens, strides.token) &&
         valid(heads, strides.head) && valid(batch, strides.batch);
}

}  // namespace

CUtensorMap make_tensor_map(const char* op,
                            const void* data,
                            DType dtype,
                            const TensorSizes& sizes,
                            const TokenStrides& strides,
                            const TensorBox& box) {
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t dims[kRank] = {kBoxColumns, size(sizes.tokens),
                                  size(sizes.head_dim / kBoxColumns), size(sizes.heads),
                                  size(sizes.batch)};
  const cuuint64_t byte_strides[kRank - 1] = {size(stride_bytes(sizes.tokens, strides.token)),
                                              kBoxColumns * kElementBytes,
                                              size(stride_bytes(sizes.heads, strides.head)),
                                              size(stride_bytes(sizes.batch, strides.batch))};
  const cuuint32_t box_dims[kRank] = {kBoxColumns, static_cast<cuuint32_t>(box.rows),
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

bool fits(const AttentionParams& p) {
  const int64_t key_rows = tile_config(static_cast<int>(p.head_dim)).key_rows;
  const int64_t num_tiles = p.batch * p.q_heads * (p.rows.end - p.rows.begin);
  return p.q_block == kQueryRows && p.kv_block % key_rows == 0 && p.kv_len > 0 &&
         p.kv_len + p.kv_block <= kMaxTokens && p.q_len <= kMaxTokens && p.q_offset <= kMaxTokens &&
         num_tiles < kMaxTiles && p.list_capacity <= kMaxTokens &&
         addressable(p.q, p.q_len, p.q_heads, p.batch, p.q_strides) &&
         addressable(p.k, p.kv_len, p.kv_heads, p.batch, p.k_strides) &&
         addressable(p.v, p.kv_len, p.kv_heads, p.batch, p.v_strides) &&
         addressable(p.out, p.q_len, p.q_heads, p.batch, p.out_strides);
}

}  // namespace proxyattn::cuda::sm90
