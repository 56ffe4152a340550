// Stage 3, estimate_budgets, second kernel: from block sums to budgets, one thread block a head.
//
//   row_lse[r] = log2 sum_n 2^block_lse[n, r]
//   a[n]       = sum_r 2^(block_lse[n, r] - row_lse[r])
//   budget     = the smallest k whose k largest a sum to at least gamma * (sum of all a)
//
// block_lse is [batch * q_heads, kv_blocks, q_block], budgets [batch * q_heads]. The first two
// lines are sums in a fixed order; a is a sum over rows rather than their mean, which does not
// change the budget. A radix sort in shared memory, kItems values a thread, then puts a in falling
// order and a scan in double finds the first prefix that reaches the target.
//
// Shared memory: the row sums, then a, over which the sort and the scan work. A NaN anywhere makes
// the total NaN, and the budget is every block.
#pragma once

#include <cstdint>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/budget/block_lse_kernel.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax.cuh"

namespace proxyattn::cuda {

inline constexpr int kCountThreads = 512;
inline constexpr int kMaxBudgetRows = 128;

template <int kItems>
struct BudgetCounter {
  static constexpr int kCapacity = kCountThreads * kItems;
  static constexpr int kWarps = kCountThreads / kWarpLanes;
  static constexpr int kLoads = 8;  // in flight per thread
  // Keeping the sort's counters in registers between its passes is faster where they fit.
  static constexpr int kRadixBits = 4;
  static constexpr bool kKeepCounters = kItems <= 16;
  using Sort =
      cub::BlockRadixSort<float, kCountThreads, kItems, cub::NullType, kRadixBits, kKeepCounters>;
  using Scan = cub::BlockScan<double, kCountThreads>;

  struct Shared {
    float row_lse[kMaxBudgetRows];
    int budget;
    union {
      struct {
        float max[kCountThreads];
        float sum[kCountThreads];
      } parts;
      float mass[kCapacity];
      typename Sort::TempStorage sort;
      typename Scan::TempStorage scan;
    };
  };

  const BudgetProblem& p;
  Shared& shared;
  const float* block_lse;  // of the head

  // A thread adds up every num_parts-th block of one row; the parts are then added in order.
  PROXYATTN_DEVICE void find_row_lse() const {
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread % p.q_block;
    const int num_parts = kCountThreads / p.q_block;
    float largest = kMinusInfinity;
    float sum = 0.0f;
    for (int first = thread / p.q_block; first < p.num_kv_blocks; first += num_parts * kLoads) {
      float lse[kLoads];
      float seen = largest;
      PROXYATTN_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const int block = first + i * num_parts;
        lse[i] =
            block < p.num_kv_blocks ? block_lse[int64_t{block} * p.q_block + row] : kMinusInfinity;
      }
      PROXYATTN_UNROLL
      for (int i = 0; i < kLoads; ++i) seen = fmaxf(seen, lse[i]);
      const float reference = log2_reference(seen);
      sum *= ptx::ex2(largest - reference);
      PROXYATTN_UNROLL
      for (int i = 0; i < kLoads; ++i) sum += ptx::ex2(lse[i] - reference);
      largest = seen;
    }
    shared.parts.max[thread] = largest;
    shared.parts.sum[thread] = sum;
    __syncthreads();  // the parts are written
    if (thread < p.rows) {
      for (int part = 1; part < num_parts; ++part) {
        largest = fmaxf(largest, shared.parts.max[part * p.q_block + thread]);
      }
      const float reference = log2_reference(largest);
      sum = 0.0f;
      for (int part = 0; part < num_parts; ++part) {
        const int i = part * p.q_block + thread;
        sum += shared.parts.sum[i] * ptx::ex2(shared.parts.max[i] - reference);
      }
      shared.row_lse[thread] = reference + log2f(sum);
    }
    __syncthreads();  // row_lse is written, and the parts are read
  }

  // A warp takes a block, a lane every 32nd row of it.
  PROXYATTN_DEVICE void find_mass() const {
    constexpr int kLaneRows = kMaxBudgetRows / kWarpLanes;
    const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
    float row_lse[kLaneRows];
    PROXYATTN_UNROLL
    for (int i = 0; i < kLaneRows; ++i) {
      const int row = lane + i * kWarpLanes;
      row_lse[i] = row < p.rows ? shared.row_lse[row] : 0.0f;
    }
    for (int block = static_cast<int>(threadIdx.x) / kWarpLanes; block < p.num_kv_blocks;
         block += kWarps) {
      const float* lse = block_lse + int64_t{block} * p.q_block;
      double sum = 0.0;
      PROXYATTN_UNROLL
      for (int i = 0; i < kLaneRows; ++i) {
        const int row = lane + i * kWarpLanes;
        if (row < p.rows) sum += static_cast<double>(ptx::ex2(lse[row] - row_lse[i]));
      }
      sum = group_sum<kWarpLanes>(sum);
      if (lane == 0) shared.mass[block] = static_cast<float>(sum);
    }
    __syncthreads();  // mass is written
  }

  // Leaves the budget in shared.budget.
  PROXYATTN_DEVICE void count() const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) shared.budget = p.num_kv_blocks;
    float mass[kItems];
    PROXYATTN_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int block = i * kCountThreads + thread;  // in any order
      mass[i] = block < p.num_kv_blocks ? shared.mass[block] : 0.0f;
    }
    __syncthreads();  // mass is read, and the sort may use its place
    Sort(shared.sort).SortDescending(mass);
    double sum = 0.0;
    PROXYATTN_UNROLL
    for (int i = 0; i < kItems; ++i) sum += static_cast<double>(mass[i]);
    double before;
    double total;
    __syncthreads();  // the sort is done with the memory that the scan uses
    Scan(shared.scan).ExclusiveSum(sum, before, total);
    const double target = p.gamma * total;
    if (!(total > 0.0)) return;
    PROXYATTN_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int blocks = thread * kItems + i + 1;
      before += static_cast<double>(mass[i]);
      if (before >= target) {
        atomicMin(&shared.budget, blocks);
        break;
      }
    }
  }
};

template <int kItems>
__global__ void __launch_bounds__(kCountThreads, 1)
    count_blocks_kernel(const __grid_constant__ BudgetProblem p) {
  using Counter = BudgetCounter<kItems>;
  extern __shared__ __align__(16) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Counter::Shared*>(bytes);
  const int64_t head = blockIdx.x;
  const Counter counter{p, shared, p.block_lse + head * p.num_kv_blocks * p.q_block};
  counter.find_row_lse();
  counter.find_mass();
  counter.count();
  __syncthreads();  // every thread has put in its bid for the budget
  if (threadIdx.x == 0) p.budgets[head] = shared.budget;
}

inline constexpr int kFillThreads = 128;

// Budgets that the settings alone decide.
static __global__ void __launch_bounds__(kFillThreads)
    fill_budgets_kernel(int32_t* budgets, int64_t count, int32_t value) {
  const int64_t idx = int64_t{blockIdx.x} * kFillThreads + threadIdx.x;
  if (idx < count) budgets[idx] = value;
}

}  // namespace proxyattn::cuda
