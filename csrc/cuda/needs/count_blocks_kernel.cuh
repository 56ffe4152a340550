// Stage 3, estimate_budgets, last kernel: from masses to counts, one thread block a head.
//
//   budget = the smallest k whose k largest masses sum to at least gamma * (sum of all masses)
//
// mass is [heads, kv_blocks] (layout.h), budgets [sequences, q_heads]. A radix sort in shared
// memory, kItems values a thread, puts the masses in falling order and a scan in double finds the
// first prefix that reaches the target. A NaN anywhere makes the total NaN, and the budget is every
// block. Sequences are counted by a kernel of their size, for sums depend on it: of packed ones
// each size is launched, and leaves the others' alone.
#pragma once

#include <cstdint>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/common/macros.cuh"
#include "cuda/needs/layout.h"

namespace proxyattn::cuda {

inline constexpr int kCountThreads = 512;

struct CountProblem {
  NeedLayout layout;
  int32_t* budgets;
  int too_few;  // key blocks that a smaller kernel counts
  double gamma;
};

template <int kItems>
struct BlockCounter {
  static constexpr int kCapacity = kCountThreads * kItems;
  // Keeping the sort's counters in registers between its passes is faster where they fit.
  static constexpr int kRadixBits = 4;
  static constexpr bool kKeepCounters = kItems <= 16;
  using Sort =
      cub::BlockRadixSort<float, kCountThreads, kItems, cub::NullType, kRadixBits, kKeepCounters>;
  using Scan = cub::BlockScan<double, kCountThreads>;

  struct Shared {
    int budget;
    union {
      typename Sort::TempStorage sort;
      typename Scan::TempStorage scan;
    };
  };
};

template <int kItems>
__global__ void __launch_bounds__(kCountThreads, 1)
    count_blocks_kernel(const __grid_constant__ CountProblem p) {
  using Counter = BlockCounter<kItems>;
  extern __shared__ __align__(16) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Counter::Shared*>(bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const HeadMass masses = p.layout.head_mass(blockIdx.x);
  if (masses.num_blocks <= p.too_few || masses.num_blocks > Counter::kCapacity) return;
  if (thread == 0) shared.budget = masses.num_blocks;
  float mass[kItems];
  PROXYATTN_UNROLL
  for (int i = 0; i < kItems; ++i) {
    const int block = i * kCountThreads + thread;  // in any order
    mass[i] = block < masses.num_blocks ? masses.blocks[block] : 0.0f;
  }
  typename Counter::Sort(shared.sort).SortDescending(mass);
  double sum = 0.0;
  PROXYATTN_UNROLL
  for (int i = 0; i < kItems; ++i) sum += static_cast<double>(mass[i]);
  double before;
  double total;
  __syncthreads();  // the sort is done with the memory that the scan uses
  typename Counter::Scan(shared.scan).ExclusiveSum(sum, before, total);
  const double target = p.gamma * total;
  if (total > 0.0) {
    PROXYATTN_UNROLL
    for (int i = 0; i < kItems; ++i) {
      before += static_cast<double>(mass[i]);
      if (before >= target) {
        atomicMin(&shared.budget, thread * kItems + i + 1);
        break;
      }
    }
  }
  __syncthreads();  // every thread has put in its bid for the budget
  if (thread == 0) p.budgets[blockIdx.x] = shared.budget;
}

}  // namespace proxyattn::cuda
