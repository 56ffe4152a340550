// Stage 3, estimate_shares, last kernel: from masses to shares, one thread block a head.
//
//   share = (sum of the forced blocks' masses) / (sum of all masses)
//
// mass is [heads, kv_blocks], shares [heads]. Sums are in double, each thread's in rising order of
// the blocks and then across threads by a tree: one order for any number of heads. A NaN anywhere
// and a sum of zero make the share NaN.
#pragma once

#include <cstdint>
#include <cub/block/block_reduce.cuh>

#include "common/block_grid.h"
#include "cuda/common/macros.cuh"

namespace proxyattn::cuda {

inline constexpr int kShareThreads = 256;

struct ShareProblem {
  const float* mass;
  float* shares;
  int64_t num_kv_blocks;
  ForcedBlocks forced;  // of the last queries
};

static __global__ void __launch_bounds__(kShareThreads)
    share_kernel(const __grid_constant__ ShareProblem p) {
  using Reduce = cub::BlockReduce<double, kShareThreads>;
  __shared__ typename Reduce::TempStorage scratch;
  const float* head_mass = p.mass + int64_t{blockIdx.x} * p.num_kv_blocks;
  double forced = 0.0;
  double total = 0.0;
  for (int64_t block = threadIdx.x; block < p.num_kv_blocks; block += kShareThreads) {
    const double mass = head_mass[block];
    total += mass;
    if (p.forced.rank_of(block) >= 0) forced += mass;
  }
  total = Reduce(scratch).Sum(total);
  __syncthreads();  // the first sum is done with the scratch
  forced = Reduce(scratch).Sum(forced);
  if (threadIdx.x != 0) return;
  p.shares[blockIdx.x] =
      total > 0.0 ? static_cast<float>(min(forced / total, 1.0)) : __int_as_float(0x7fffffff);
}

}  // namespace proxyattn::cuda
