// Host side of the family: tensor maps, items and the launch.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "proxyattn/needs.h"

#include "common/validate.h"
#include "cuda/common/launch.h"
#include "cuda/common/softmax.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/needs/dispatch.h"
#include "cuda/needs/layout.h"
#include "cuda/needs/sm90/kernel.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
NeedProblem make_need_problem(const NeedParams& b, int multiprocessors) {
  const char* op = needs_op(b);
  NeedProblem p{};
  p.q_map = make_tensor_map(op, b.q, b.dtype, {b.q_len, b.head_dim, b.q_heads, b.batch},
                            b.q_strides, {kGroupRows, Traits::kBoxes});
  p.keys =
      make_key_maps(op, b.k, b.dtype, {b.kv_len, b.head_dim, b.kv_heads, b.batch}, b.k_strides);
  const NeedLayout layout(b);
  p.block_lse = layout.block_lse;
  p.kv_heads = static_cast<int>(b.kv_heads);
  p.group_heads = static_cast<int>(b.q_heads / b.kv_heads);
  p.head_units = static_cast<int>(b.q_block) / kGroupRows;
  p.group_tiles = ceil_div(p.group_heads * p.head_units, Traits::kGroups);
  p.first_query = static_cast<int>(b.q_len - layout.rows);
  p.position = static_cast<int>(b.q_offset) + p.first_query;
  p.num_keys = static_cast<int>(b.kv_len);
  p.num_key_tiles = ceil_div(p.num_keys, kLogitKeys);
  p.num_kv_blocks = static_cast<int>(layout.num_kv_blocks);
  p.causal = b.causal ? 1 : 0;
  p.factor = b.scale * kLog2E;

  // As many chunks as give every multiprocessor this many items, of whole stretches.
  constexpr int kItemsPerMultiprocessor = 8;
  const int row_tiles = static_cast<int>(b.batch) * p.kv_heads * p.group_tiles;
  const int chunks = max_of(1, multiprocessors * kItemsPerMultiprocessor / row_tiles);
  p.chunk_tiles = round_up(ceil_div(p.num_key_tiles, chunks), kStretchTiles);
  p.num_chunks = ceil_div(p.num_key_tiles, p.chunk_tiles);
  p.num_items = row_tiles * p.num_chunks;
  return p;
}

template <typename Traits, int kBlockKeys>
void launch_block_lse_kernel(const NeedParams& params, Stream stream) {
  const char* op = needs_op(params);
  const int multiprocessors = device_attribute(op, cudaDevAttrMultiProcessorCount);
  const NeedProblem problem = make_need_problem<Traits>(params, multiprocessors);
  LaunchShape shape{};
  shape.grid_x = min_of<int64_t>(multiprocessors, problem.num_items);
  shape.grid_y = shape.grid_z = 1;
  shape.threads = Traits::kThreads;
  shape.shared_bytes = sizeof(NeedStorage<Traits>);
  launch<block_lse_kernel<Traits, kBlockKeys>>(op, shape, stream, problem);
}

template <int kHeadDim, DType kDType>
void launch_block_lse(const NeedParams& params, Stream stream) {
  using Traits = LogitTraits<kHeadDim, kDType>;
  if (params.batch == 0) return;
  if (params.kv_block == kLogitKeys) {
    launch_block_lse_kernel<Traits, kLogitKeys>(params, stream);
  } else {
    launch_block_lse_kernel<Traits, kLogitKeys / 2>(params, stream);
  }
}

}  // namespace proxyattn::cuda::sm90
