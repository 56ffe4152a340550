// Stage 2, score_blocks, first pass: the log-sum-exp of every sampled query over its visible keys.
//
//   lse[r] = log2 sum_u 2^(factor * q_r . k_u),  factor = scale * log2(e)
//
// A thread block owns 128 rows and one chunk of keys, so that a short call still fills the device;
// combine_lse_kernel adds the chunks up, in order. A chunk starts at a multiple of its length and
// every lane adds up its own columns, so what a row gets depends neither on the rows beside it nor
// on the range of query blocks asked for. Shared memory: the ring of LogitTiles.
#pragma once

#include <cstdint>

#include "cuda/common/logits.cuh"
#include "cuda/score/problem.h"

namespace proxyattn::cuda {

// Where the rows and keys of an item come from, and which keys each row sees.
template <typename Traits>
struct ScoreTile {
  using Element = typename Traits::Element;
  static_assert(kScoreTileRows == Traits::kTileRows);

  RowSource<Element> halves[2];
  KeyRows<Element> keys;
  int first_key;
  int end_key;
  int unmasked_keys;

  PROXYATTN_DEVICE ScoreTile(const ScoreProblem& p, const ScoreItem& item)
      : first_key(item.first_key(p)),
        end_key(item.end_key(p)),
        unmasked_keys(item.unmasked_keys(p)) {
    const int64_t batch = item.list / p.proxy_heads;
    const int64_t head = item.list % p.proxy_heads;
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = item.first_row + half * Traits::kHalfRows;
      halves[half].first = static_cast<const Element*>(p.q) + batch * p.q_strides.batch +
                           head * p.q_strides.head + (p.first_row + row) * p.q_strides.token;
      halves[half].valid = static_cast<int>(
          max_of<int64_t>(0, min_of<int64_t>(p.num_rows - row, Traits::kHalfRows)));
    }
    keys.first = static_cast<const Element*>(p.k) + batch * p.k_strides.batch +
                 head / p.key_sharers * p.k_strides.head;
    keys.stride = p.k_strides.token;
    keys.count = p.num_keys;
    keys.aligned = p.k_aligned;
  }
};

template <typename Traits>
PROXYATTN_DEVICE void find_limits(typename Traits::RowLimits& limits,
                                  const ScoreProblem& p,
                                  const ScoreItem& item) {
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      limits[r][half] = p.visible_keys(item.first_row + Traits::row(r, half));
    }
  }
}

template <typename Traits>
struct LseConsumer {
  RowSums<Traits> sums;
  typename Traits::RowLimits limits;
  int unmasked_keys;
  float factor;

  PROXYATTN_DEVICE void operator()(typename Traits::Logits& logits, int first_key) {
    if (first_key + Traits::kTileKeys > unmasked_keys) {
      mask_logits<Traits>(logits, limits, first_key);
    }
    sums.add(logits, factor);
  }
};

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(LogitTraits<Element, kHeadDim>::kThreads,
                                  LogitTraits<Element, kHeadDim>::kBlocksPerSm)
    row_lse_kernel(const __grid_constant__ ScoreProblem p) {
  using Traits = LogitTraits<Element, kHeadDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const ScoreItem item(p, blockIdx.x);
  const ScoreTile<Traits> tile(p, item);
  if (tile.end_key <= tile.first_key) return;

  LogitTiles<Traits> logits(shared);
  logits.load_rows(tile.halves[0], tile.halves[1], p.q_strides.token, p.q_aligned);
  LseConsumer<Traits> consumer;
  consumer.unmasked_keys = tile.unmasked_keys;
  consumer.factor = p.factor;
  find_limits<Traits>(consumer.limits, p, item);
  logits.for_each_tile(tile.keys, tile.first_key, tile.end_key, consumer);

  float* lse = p.lse + item.list * p.lse_pitch + item.chunk * p.num_rows;
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = consumer.sums.log2_sum(r, half);
      const int64_t row = item.first_row + Traits::row(r, half);
      if (threadIdx.x % kQuadLanes == 0 && row < p.num_rows) lse[row] = sum;
    }
  }
}

inline constexpr int kCombineThreads = 128;

// One thread a row. Chunks behind the row's last visible key were never written.
static __global__ void __launch_bounds__(kCombineThreads)
    combine_lse_kernel(const __grid_constant__ ScoreProblem p) {
  const int64_t idx = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x;
  if (idx >= p.lists * p.num_rows) return;
  const int64_t row = idx % p.num_rows;
  float* lse = p.lse + idx / p.num_rows * p.lse_pitch + row;
  const int num_chunks = (p.visible_keys(row) + p.chunk_keys - 1) / p.chunk_keys;
  float largest = kMinusInfinity;
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    largest = fmaxf(largest, lse[chunk * p.num_rows]);
  }
  const float reference = log2_reference(largest);
  float sum = 0.0f;
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    sum += ptx::ex2(lse[chunk * p.num_rows] - reference);
  }
  lse[0] = sum == 0.0f ? kMinusInfinity : reference + log2f(sum);
}

}  // namespace proxyattn::cuda
