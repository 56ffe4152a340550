// Stage 2, score_blocks, first pass: the log-sum-exp of every sampled query over its visible keys.
//
//   lse[r] = log2 sum_u 2^(factor * q_r . k_u),  factor = scale * log2(e)
//
// A thread block owns 128 rows and one chunk of keys, so that a short call still fills the device;
// combine_lse_kernel adds the chunks up, in order. A chunk starts at a multiple of its length and
// every lane adds up its own columns, so what a row gets depends neither on the rows beside it nor
// on the range of query blocks asked for. Row tiles of packed sequences are numbered as runs of
// query blocks. Shared memory: the ring of LogitTiles.
#pragma once

#include <cstdint>

#include "cuda/common/key_rows.cuh"
#include "cuda/common/logits.cuh"
#include "cuda/score/problem.h"

namespace proxyattn::cuda {

// Where the rows and keys of a thread block's work come from.
template <typename Traits>
struct ScoreTile {
  using Element = typename Traits::Element;
  static_assert(kScoreTileRows == Traits::kTileRows && kScoreTileKeys == Traits::kTileKeys);

  RowSource<Element> halves[2];
  KeyRows<Element> keys;

  PROXYATTN_DEVICE explicit ScoreTile(const ScoreChunk& chunk) {
    const ScoreWork& work = chunk.work;
    const ScoreSource& source = chunk.source;
    const ScoreProblem& p = chunk.p;
    const int64_t batch = work.list / p.proxy_heads;
    const int64_t head = work.list % p.proxy_heads;
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = work.first_row + half * Traits::kHalfRows;
      halves[half].first = static_cast<const Element*>(p.q) + batch * p.q_strides.batch +
                           head * p.q_strides.head + (source.first_query + row) * p.q_strides.token;
      halves[half].valid = static_cast<int>(
          max_of<int64_t>(0, min_of<int64_t>(source.num_rows - row, Traits::kHalfRows)));
    }
    keys.first = static_cast<const Element*>(p.k) + batch * p.k_strides.batch +
                 head / p.key_sharers * p.k_strides.head + source.first_key * p.k_strides.token;
    keys.stride = p.k_strides.token;
    keys.count = source.num_keys;
    keys.aligned = p.k_aligned;
  }
};

template <typename Traits>
PROXYATTN_DEVICE void find_limits(typename Traits::RowLimits& limits, const ScoreChunk& chunk) {
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      limits[r][half] =
          chunk.p.visible_keys(chunk.source, chunk.work.first_row + Traits::row(r, half));
    }
  }
}

template <typename Traits>
PROXYATTN_DEVICE void find_begins(typename Traits::RowLimits& begins, const ScoreChunk& chunk) {
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      begins[r][half] =
          chunk.p.hidden_keys(chunk.source, chunk.work.first_row + Traits::row(r, half));
    }
  }
}

// Calls run(chunk) for each chunk of a thread block's row tile, which is one unless sequences are
// packed; collective. Their numbers of chunks differ, so a few thread blocks share those of a tile,
// and of a short sequence's few find none. What the thread block works on then lies in shared
// memory, as products leave no registers for it.
template <bool kPacked, typename Run>
PROXYATTN_DEVICE void for_each_chunk(const ScoreProblem& p, const Run& run) {
  const ScorePlace place(p, blockIdx.x);
  if constexpr (kPacked) {
    __shared__ ScoreSource source;
    __shared__ ScoreWork work;
    if (threadIdx.x == 0) {
      source = p.packed_source(place.tile);
      work = place.work(source);
    }
    __syncthreads();  // both are written
    if (work.first_row >= source.num_rows) return;
    PROXYATTN_NO_UNROLL
    while (work.chunk < source.num_chunks()) {
      run(ScoreChunk{p, source, work});
      __syncthreads();  // all have read the shared memory that the next chunk goes through
      if (threadIdx.x == 0) work.chunk += p.chunk_step;
      __syncthreads();  // it is known which that is
    }
  } else {
    const ScoreWork work = place.work(p.entry);
    run(ScoreChunk{p, p.entry, work});
  }
}

template <typename Traits, bool kWindowed>
struct LseConsumer {
  RowSums<Traits> sums;
  typename Traits::RowLimits limits;
  typename Traits::RowLimits begins;  // with a window
  int unmasked_keys;
  int cut_keys;  // with a window
  float factor;

  PROXYATTN_DEVICE void operator()(typename Traits::Logits& logits, int first_key) {
    if (first_key + Traits::kTileKeys > unmasked_keys) {
      mask_logits<Traits>(logits, limits, first_key);
    }
    if constexpr (kWindowed) {
      if (first_key < cut_keys) hide_logits_before<Traits>(logits, begins, first_key);
    }
    sums.add(logits, factor);
  }
};

template <typename Traits, bool kWindowed>
PROXYATTN_DEVICE void run_lse_chunk(const ScoreChunk& chunk, const void* shared) {
  const ScoreProblem& p = chunk.p;
  const ScoreWork& work = chunk.work;
  const ScoreSource& source = chunk.source;
  const int begin_key = kWindowed ? chunk.begin_key() : chunk.first_key();
  const int end_key = chunk.end_key();
  if (end_key <= begin_key) return;
  const ScoreTile<Traits> tile(chunk);
  LogitTiles<Traits> logits(shared);
  logits.load_rows(tile.halves[0], tile.halves[1], p.q_strides.token, p.q_aligned);
  LseConsumer<Traits, kWindowed> consumer;
  consumer.unmasked_keys = chunk.unmasked_keys();
  consumer.factor = p.factor;
  find_limits<Traits>(consumer.limits, chunk);
  if constexpr (kWindowed) {
    consumer.cut_keys = chunk.cut_keys();
    find_begins<Traits>(consumer.begins, chunk);
  }
  logits.for_each_tile(tile.keys, begin_key, end_key, consumer);

  float* lse = p.lse + work.list * p.lse_pitch + work.chunk * p.lse_rows + source.first_lse;
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = consumer.sums.log2_sum(r, half);
      const int64_t row = work.first_row + Traits::row(r, half);
      if (threadIdx.x % kQuadLanes == 0 && row < source.num_rows) lse[row] = sum;
    }
  }
}

// Windows are a kernel of their own: without one their masks would be dead weight in the loop.
template <typename Element, int kHeadDim, bool kPacked, bool kWindowed>
__global__ void __launch_bounds__(LogitTraits<Element, kHeadDim>::kThreads,
                                  LogitTraits<Element, kHeadDim>::kBlocksPerSm)
    row_lse_kernel(const __grid_constant__ ScoreProblem p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  for_each_chunk<kPacked>(p, [&](const ScoreChunk& chunk) {
    run_lse_chunk<LogitTraits<Element, kHeadDim>, kWindowed>(chunk, shared);
  });
}

inline constexpr int kCombineThreads = 128;

// One thread a row. Chunks behind the row's last visible key, and before the first, were never
// written.
static __global__ void __launch_bounds__(kCombineThreads)
    combine_lse_kernel(const __grid_constant__ ScoreProblem p) {
  const int64_t idx = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x;
  if (idx >= p.lists * p.lse_rows) return;
  const int64_t place = idx % p.lse_rows;
  ScoreSource source = p.entry;
  if (p.is_packed()) {
    const int32_t owner = p.packed_tiles.table.block_sequence[place / p.block_rows];
    if (owner >= p.packed_tiles.table.count) return;
    source = p.source(p.packed_tiles.table.sequences[owner]);
  }
  float* lse = p.lse + idx / p.lse_rows * p.lse_pitch + place;
  const int64_t row = place - source.first_lse;
  const int first_chunk = p.hidden_keys(source, row) / source.chunk_keys;
  const int end_chunk = ceil_div(p.visible_keys(source, row), source.chunk_keys);
  float largest = kMinusInfinity;
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
    largest = fmaxf(largest, lse[chunk * p.lse_rows]);
  }
  const float reference = log2_reference(largest);
  float sum = 0.0f;
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
    sum += ptx::ex2(lse[chunk * p.lse_rows] - reference);
  }
  lse[0] = sum == 0.0f ? kMinusInfinity : reference + log2f(sum);
}

}  // namespace proxyattn::cuda
