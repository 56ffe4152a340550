// Host side of the family: which layouts it takes, tensor maps, scratch and the launch.
#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda_runtime.h>

#include "proxyattn/attention.h"

#include "common/block_grid.h"
#include "cuda/attention/dispatch.h"
#include "cuda/attention/sm90/kernel.cuh"
#include "cuda/attention/sm90/tile_order.h"
#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sequences/tensor_sizes.h"

namespace proxyattn::cuda::sm90 {

inline constexpr const char* kOp = "block_sparse_attention";

// Keys and values that are read at about the same time.
inline int64_t section_bytes() {
  return int64_t{device_attribute(kOp, cudaDevAttrL2CacheSize)} / 3 * 2;
}

inline int log2_of(int64_t power_of_two) {
  int log2 = 0;
  while (power_of_two >> log2 > 1) ++log2;
  return log2;
}

template <typename Traits>
Problem make_problem(const AttentionParams& a) {
  Problem p{};
  const TensorSizes queries = query_sizes(a);
  const TensorSizes keys = key_sizes(a);
  const bool paged = a.packed.page_table != nullptr;
  const int page_rows = static_cast<int>(min_of<int64_t>(a.packed.page_len, Traits::kPartRows));
  // A whole part's boxes come in one load where they follow one another in shared memory.
  const int value_boxes = page_rows < Traits::kPartRows && paged ? 1 : Traits::kBoxes;
  const int key_boxes = Traits::kParts == 1 ? value_boxes : 1;
  const int rows = paged ? page_rows : Traits::kPartRows;
  p.q_map = make_tensor_map(kOp, a.q, a.dtype, queries, a.q_strides,
                            {Traits::kBlockRows, Traits::kBoxes});
  p.k_map = make_tensor_map(kOp, a.k, a.dtype, keys, a.k_strides, {rows, key_boxes});
  p.v_map = make_tensor_map(kOp, a.v, a.dtype, keys, a.v_strides, {rows, value_boxes});
  p.out_map = make_tensor_map(kOp, a.out, a.dtype, queries, a.out_strides, {kWarpgroupRows, 1});
  if (is_packed(a)) {
    p.v_row_map = make_tensor_map(kOp, a.v, a.dtype, keys, a.v_strides, {1, 1});
    p.packed = SequenceTable(a.packed.table, sequence_params(a, a.packed.table_stride));
  }
  if (paged) {
    p.pages = {a.packed.page_table, static_cast<int>(a.packed.table_pages),
               static_cast<int>(a.packed.num_pages), log2_of(a.packed.page_len),
               log2_of(page_rows)};
  }
  p.indices = a.indices;
  p.counts = a.counts;
  p.sink_logits = a.sink_logits;
  p.out = a.out;
  p.lse = a.lse;
  p.next_tile = static_cast<int32_t*>(a.workspace);
  p.out_batch_stride = a.out_strides.batch;
  p.out_token_stride = a.out_strides.token;
  p.out_head_stride = a.out_strides.head;
  p.visibility = Visibility<int>(a.causal, a.window);
  p.tiles = make_tile_order(a, Traits::kHeads, section_bytes());
  p.list_capacity = static_cast<int>(a.list_capacity);
  p.sequence = {};
  p.sequence.q_len = static_cast<int>(a.q_len);
  p.sequence.kv_len = static_cast<int>(a.kv_len);
  p.sequence.offset = static_cast<int>(a.q_offset);
  p.sequence.first_q_block = -static_cast<int>(a.list_rows.begin);
  p.list_rows = static_cast<int>(a.list_rows.end - a.list_rows.begin);
  p.lse_pitch = static_cast<int>(a.lse_pitch);
  p.kv_tokens = static_cast<int>(keys.tokens);
  p.cached_keys = static_cast<int>(section_bytes() /
                                   (2 * a.head_dim * int64_t{sizeof(typename Traits::Element)}));
  p.kv_block = static_cast<int>(a.kv_block);
  p.tiles_per_block = max_of(1, static_cast<int>(a.kv_block) / Traits::kKeyRows);
  p.rankings = a.indices != nullptr && a.lists_are_rankings ? 1 : 0;
  p.scale_log2 = a.scale * kLog2E;
  return p;
}

template <typename Traits>
void launch_kernel(const AttentionParams& params, Stream stream) {
  Problem problem = make_problem<Traits>(params);
  // Each launch counts its own tiles; a memset is a node of a captured graph like any other.
  PROXYATTN_CUDA_CALL(kOp, cudaMemsetAsync(problem.next_tile, 0, kCounterBytes, stream));
  LaunchShape shape{};
  shape.grid_x = min_of<int64_t>(device_attribute(kOp, cudaDevAttrMultiProcessorCount),
                                 ceil_div(problem.tiles.num_tiles, Traits::kTeams));
  problem.num_teams = static_cast<int>(shape.grid_x) * Traits::kTeams;
  shape.threads = Traits::kThreads;
  shape.shared_bytes = Traits::kTeams * sizeof(SharedStorage<Traits>);
  launch<attention_kernel<Traits>>(kOp, shape, stream, problem);
}

template <int kHeadDim, DType kDType>
void launch_attention(const AttentionParams& params, Stream stream) {
  if (params.batch == 0 || params.rows.begin == params.rows.end) return;
  if (params.q_block == kSmallBlock) {
    return launch_kernel<Traits<kHeadDim, kDType, BlockSizes::kSmall>>(params, stream);
  }
  if constexpr (tile_parts(kHeadDim, BlockSizes::kSmallKeys) > 1) {
    if (params.kv_block == kSmallBlock) {
      return launch_kernel<Traits<kHeadDim, kDType, BlockSizes::kSmallKeys>>(params, stream);
    }
  }
  launch_kernel<Traits<kHeadDim, kDType>>(params, stream);
}

}  // namespace proxyattn::cuda::sm90
