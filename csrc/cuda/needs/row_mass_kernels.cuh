// Stage 3, what each head needs, second and third kernel: from block sums to each block's mass.
//
//   part_lse[p, r] = log2 of the sum over the blocks n of part p of 2^block_lse[n, r]
//   row_lse[r]     = log2 of the sum over parts p of 2^part_lse[p, r]
//   mass[n]        = sum over rows r of 2^(block_lse[n, r] - row_lse[r])
//
// for each query head; block_lse is [heads, kv_blocks, q_block], mass [heads, kv_blocks], and of
// packed sequences each has its blocks and parts among a head's (layout.h). A thread block owns the
// kBlocksPerPart blocks of one part of one head; the second of the two kernels adds up the part_lse
// of all parts of the sequence first, which are few. Everything is added in a fixed order. A NaN
// makes its row's row_lse NaN, and with it the mass of every block; but blocks that a window hides
// have none.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/needs/layout.h"

namespace proxyattn::cuda {

inline constexpr int kMassThreads = 256;
inline constexpr int kMassWarps = kMassThreads / kWarpLanes;
inline constexpr int kMaxNeedRows = 128;

// Sum of 2^x over all x added, without overflow.
struct LogSum {
  float largest = kMinusInfinity;
  float sum = 0.0f;

  template <int kCount>
  PROXYATTN_DEVICE void add(const float (&values)[kCount]) {
    float seen = largest;
    PROXYATTN_UNROLL
    for (const float value : values) seen = fmaxf(seen, value);
    const float reference = seen == kMinusInfinity ? 0.0f : seen;
    sum *= ptx::ex2(largest - reference);
    PROXYATTN_UNROLL
    for (const float value : values) sum += ptx::ex2(value - reference);
    largest = seen;
  }

  PROXYATTN_DEVICE float log2() const {
    if (sum == 0.0f) return kMinusInfinity;
    return (largest == kMinusInfinity ? 0.0f : largest) + log2f(sum);
  }
};

// The log-sum over `count` values that lie `pitch` floats apart.
PROXYATTN_DEVICE float log_sum_column(const float* values, int64_t pitch, int count) {
  constexpr int kLoads = 8;  // in flight
  LogSum total;
  for (int first = 0; first < count; first += kLoads) {
    float loaded[kLoads];
    PROXYATTN_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      loaded[i] = first + i < count ? values[(first + i) * pitch] : kMinusInfinity;
    }
    total.add(loaded);
  }
  return total.log2();
}

// Grid: parts, then heads.
static __global__ void __launch_bounds__(kMassThreads)
    part_lse_kernel(const __grid_constant__ NeedLayout p) {
  __shared__ float shares[kMassThreads];
  const int64_t head = blockIdx.x / p.num_parts;
  const int64_t part = blockIdx.x - head * p.num_parts;
  const NeedSpan span = p.span_of_part(part);
  const int64_t own_part = part - span.first_part;
  if (own_part >= span.num_parts) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int q_block = static_cast<int>(p.q_block);
  const int row = thread % q_block;
  const int num_shares = kMassThreads / q_block;
  const int64_t begin = max_of<int64_t>(own_part * kBlocksPerPart, span.hidden_blocks);
  const int64_t first = begin + thread / q_block;
  const int64_t end = min_of<int64_t>((own_part + 1) * kBlocksPerPart, span.num_blocks);
  const int count =
      static_cast<int>(ceil_div(max_of<int64_t>(0, end - first), int64_t{num_shares}));
  const int64_t block = head * p.num_kv_blocks + span.first_block + first;
  shares[thread] =
      log_sum_column(p.block_lse + block * q_block + row, int64_t{num_shares} * q_block, count);
  __syncthreads();  // the shares are written
  if (thread >= q_block) return;
  p.part_lse[(head * p.num_parts + part) * q_block + row] =
      log_sum_column(shares + row, q_block, num_shares);
}

// Grid: parts, then heads.
static __global__ void __launch_bounds__(kMassThreads)
    block_mass_kernel(const __grid_constant__ NeedLayout p) {
  constexpr int kLaneRows = kMaxNeedRows / kWarpLanes;
  __shared__ float row_lse[kMaxNeedRows];
  const int64_t head = blockIdx.x / p.num_parts;
  const int64_t part = blockIdx.x - head * p.num_parts;
  const NeedSpan span = p.span_of_part(part);
  const int64_t own_part = part - span.first_part;
  if (own_part >= span.num_parts) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpLanes;
  if (thread < span.rows) {
    const int64_t first = head * p.num_parts + span.first_part;
    row_lse[thread] =
        log_sum_column(p.part_lse + first * p.q_block + thread, p.q_block, span.num_parts);
  }
  __syncthreads();  // row_lse is written
  const int64_t first_block = head * p.num_kv_blocks + span.first_block;
  const int64_t end = min_of<int64_t>((own_part + 1) * kBlocksPerPart, span.num_blocks);
  PROXYATTN_UNROLL
  for (int i = 0; i < kBlocksPerPart / kMassWarps; ++i) {
    const int64_t block = own_part * kBlocksPerPart + i * kMassWarps + thread / kWarpLanes;
    if (block >= end) break;
    const int num_rows = block < span.hidden_blocks ? 0 : span.rows;
    const float* lse = p.block_lse + (first_block + block) * p.q_block;
    double sum = 0.0;
    PROXYATTN_UNROLL
    for (int j = 0; j < kLaneRows; ++j) {
      const int row = lane + j * kWarpLanes;
      if (row < num_rows) sum += static_cast<double>(ptx::ex2(lse[row] - row_lse[row]));
    }
    sum = group_sum<kWarpLanes>(sum);
    if (lane == 0) p.mass[first_block + block] = static_cast<float>(sum);
  }
}

}  // namespace proxyattn::cuda
