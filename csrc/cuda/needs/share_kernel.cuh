// Stage 3, estimate_shares, last kernel: from masses to shares, one thread block a head.
//
//   share = (sum of the forced blocks' masses) / (sum of all masses)
//
// mass is [heads, kv_blocks] (layout.h), shares [sequences, q_heads]. Sums are in double, each
// thread's in rising order of the blocks and then across threads by a tree: one order for any
// number of heads. A NaN anywhere and a sum of zero make the share NaN.
#pragma once

#include <cstdint>
#include <cub/block/block_reduce.cuh>

#include "common/block_grid.h"
#include "cuda/common/macros.cuh"
#include "cuda/needs/layout.h"
#include "cuda/sequences/packed.h"

namespace proxyattn::cuda {

inline constexpr int kShareThreads = 256;

struct ShareProblem {
  NeedLayout layout;
  float* shares;
  BlockGrid grid;
  int64_t num_sink_blocks;
  int64_t num_local_blocks;
  ForcedBlocks forced;  // of a batch entry's last queries

  PROXYATTN_HOST_DEVICE ForcedBlocks forced_of(int64_t need) const {
    if (layout.is_batch()) return forced;
    const Sequence& s = layout.packed_parts.table.sequences[need / layout.q_heads];
    const BlockGrid own = sequence_grid(grid, s);
    return {own, own.last_queries(), num_sink_blocks, num_local_blocks};
  }
};

static __global__ void __launch_bounds__(kShareThreads)
    share_kernel(const __grid_constant__ ShareProblem p) {
  using Reduce = cub::BlockReduce<double, kShareThreads>;
  __shared__ typename Reduce::TempStorage scratch;
  const HeadMass masses = p.layout.head_mass(blockIdx.x);
  const ForcedBlocks blocks = p.forced_of(blockIdx.x);
  double forced = 0.0;
  double total = 0.0;
  for (int64_t block = threadIdx.x; block < masses.num_blocks; block += kShareThreads) {
    const double mass = masses.blocks[block];
    total += mass;
    if (blocks.rank_of(block) >= 0) forced += mass;
  }
  total = Reduce(scratch).Sum(total);
  __syncthreads();  // the first sum is done with the scratch
  forced = Reduce(scratch).Sum(forced);
  if (threadIdx.x != 0) return;
  p.shares[blockIdx.x] =
      total > 0.0 ? static_cast<float>(min(forced / total, 1.0)) : __int_as_float(0x7fffffff);
}

}  // namespace proxyattn::cuda
