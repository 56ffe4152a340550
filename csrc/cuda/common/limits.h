// What the CUDA kernels take less of than the CPU does, element types, head sizes and key blocks,
// and what the smallest device gives them.
#pragma once

#include <cstdint>
#include <string>

#include "proxyattn/device.h"
#include "proxyattn/error.h"
#include "proxyattn/types.h"

namespace proxyattn::cuda {

// Shared memory that a thread block can ask for on every device: sm_86 and sm_89 give the least.
inline constexpr int kPortableSharedBytes = 99 * 1024;

inline void check_dtype(const char* op, DType dtype) {
  PROXYATTN_CHECK(dtype == DType::kBFloat16 || dtype == DType::kFloat16, op,
                  ": dtype must be float16 or bfloat16 on a GPU, got ", dtype_name(dtype));
}

inline void check_head_dim(const char* op, int64_t head_dim) {
  std::string listed;
  for (const int64_t size : kHeadDims) {
    if (size == head_dim) return;
    listed += (listed.empty() ? "" : ", ") + std::to_string(size);
  }
  throw InvalidArgument(
      join_message(op, ": head_dim must be one of ", listed, " on a GPU, got head_dim=", head_dim));
}

inline void check_num_kv_blocks(const char* op, int64_t num_kv_blocks) {
  PROXYATTN_CHECK(num_kv_blocks <= kMaxCudaKvBlocks, op, ": kv_len must span at most ",
                  kMaxCudaKvBlocks, " key blocks on a GPU, got ", num_kv_blocks);
}

}  // namespace proxyattn::cuda
