// Host side of the portable attention kernel: tile rows, grid, alignment.
#pragma once

#include <cstdint>

#include "proxyattn/attention.h"

#include "common/math.h"
#include "cuda/attention/dispatch.h"
#include "cuda/attention/schedule.h"
#include "cuda/attention/sm80/config.h"
#include "cuda/attention/sm80/kernel.cuh"
#include "cuda/attention/sm80/traits.h"
#include "cuda/common/launch.h"
#include "cuda/common/softmax.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/sequences/packed.h"
#include "cuda/sequences/page_table.h"

namespace proxyattn::cuda::sm80 {

inline constexpr const char* kOp = "block_sparse_attention";

// Of a [batch, tokens, heads, head_dim] tensor. A dimension of size 1 has no neighbours, whatever
// its stride says.
inline bool rows_are_aligned(
    const void* base, const TokenStrides& strides, int64_t batch, int64_t tokens, int64_t heads) {
  return cuda::rows_are_aligned(base, batch > 1 ? strides.batch : 0, tokens > 1 ? strides.token : 0,
                                heads > 1 ? strides.head : 0);
}

template <typename Traits>
void launch_tiles(const AttentionParams& p, Stream stream) {
  // Half of the L2 cache holds keys and values that are shared, the other half what streams by.
  const int64_t section_bytes = device_attribute(kOp, cudaDevAttrL2CacheSize) / 2;
  KernelParams kernel;
  kernel.args = p;
  kernel.schedule = make_schedule(p, Traits::kTileRows, section_bytes);
  kernel.num_kv_blocks = static_cast<int>(ceil_div(p.kv_len, p.kv_block));
  kernel.factor = p.scale * kLog2E;
  // Packed queries are one batch entry, pages of keys are one each.
  const bool packed = is_packed(p);
  const int64_t q_entries = packed ? 1 : p.batch;
  const int64_t kv_entries = packed ? p.packed.num_pages : p.batch;
  const int64_t q_tokens = packed ? p.packed.total_q : p.q_len;
  kernel.q_aligned = rows_are_aligned(p.q, p.q_strides, q_entries, q_tokens, p.q_heads);
  kernel.k_aligned = rows_are_aligned(p.k, p.k_strides, kv_entries, p.kv_len, p.kv_heads);
  kernel.v_aligned = rows_are_aligned(p.v, p.v_strides, kv_entries, p.kv_len, p.kv_heads);
  kernel.out_aligned = rows_are_aligned(p.out, p.out_strides, q_entries, q_tokens, p.q_heads);
  LaunchShape shape{};
  shape.grid_y = shape.grid_z = 1;
  shape.threads = kThreads;
  shape.shared_bytes = Traits::kSharedBytes;
  if (packed) {
    kernel.packed = make_packed_schedule(p, Traits::kTileRows, section_bytes);
    kernel.pages = PageTable(p.packed);
    shape.grid_x = kernel.packed.num_thread_blocks();
    launch<attention_kernel<Traits, true>>(kOp, shape, stream, kernel);
  } else {
    shape.grid_x = kernel.schedule.num_thread_blocks();
    launch<attention_kernel<Traits, false>>(kOp, shape, stream, kernel);
  }
}

// Large tiles read shared memory half as often, but one block alone on an SM leaves its tensor
// cores idle during the softmax.
inline bool two_blocks_fit(int shared_bytes_per_block) {
  return device_attribute(kOp, cudaDevAttrMaxSharedMemoryPerMultiprocessor) >=
         2 * (shared_bytes_per_block + kReservedSharedBytes);
}

template <int kHeadDim, DType kDType>
void launch_attention(const AttentionParams& params, Stream stream) {
  if (params.batch == 0) return;
  if constexpr (has_large_tile(kHeadDim)) {
    using Large = Traits<kHeadDim, kDType, kLargeTileRows>;
    if (params.q_block % kLargeTileRows == 0 && two_blocks_fit(Large::kSharedBytes)) {
      return launch_tiles<Large>(params, stream);
    }
  }
  launch_tiles<Traits<kHeadDim, kDType, kSmallTileRows>>(params, stream);
}

}  // namespace proxyattn::cuda::sm80
