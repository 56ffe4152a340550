// Stage 3, what each head needs, first kernel: how the last queries spread over the key blocks.
//
//   block_lse[h, n, r] = log2 of the sum over the visible keys u of block n of 2^(factor * q . k_u)
//
// for query r of the last `rows` ones of head h, on all tokens; factor = scale * log2(e).
// block_lse is [heads, kv_blocks, q_block] (layout.h), fp32, -inf where nothing is visible. Blocks
// that a window hides from all of the queries are left alone; in the others it hides no key.
//
// A thread block owns 128 rows, which are one or two query heads of one kv head, and a chunk of
// whole key blocks. Key blocks don't depend on each other, so any split gives the same bits. The
// tiles of a kv head run side by side and read its keys from L2. Chunks of packed sequences are
// numbered as runs of key blocks; their heads are those of one batch entry. Shared memory: the ring
// of LogitTiles.
#pragma once

#include <cstdint>

#include "cuda/common/key_rows.cuh"
#include "cuda/common/logits.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/needs/problem.h"

namespace proxyattn::cuda {

template <typename Traits>
struct BlockLseConsumer {
  const NeedProblem& p;
  float* block_lse;  // of the query head of this warp's rows; null if there is none
  int warp_row;      // row of the warp's first in its head
  int end_key;
  int unmasked_keys;
  typename Traits::RowLimits limits;
  RowSums<Traits> sums;

  PROXYATTN_DEVICE void operator()(typename Traits::Logits& logits, int first_key) {
    const int next_key = first_key + Traits::kTileKeys;
    if (next_key > unmasked_keys) mask_logits<Traits>(logits, limits, first_key);
    sums.add(logits, p.factor);
    if (next_key % p.kv_block != 0 && next_key < end_key) return;
    store(first_key / p.kv_block);
    sums.reset();
  }

  // The four lanes of a row know its sum, so each stores that of another row.
  PROXYATTN_DEVICE void store(int block) const {
    const int lane = warp_lane();
    const int mine = lane % kQuadLanes;
    float value = 0.0f;
    PROXYATTN_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      PROXYATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float sum = sums.log2_sum(r, half);
        if (mine == 2 * r + half) value = sum;
      }
    }
    if (block_lse == nullptr || mine >= 2 * Traits::kRowTiles) return;
    const int row = warp_row + mine * 8 + lane / kQuadLanes;
    block_lse[int64_t{block} * p.q_block + row] = value;
  }
};

// The keys of a kv head that a thread block reads; `first` is its first element in the tensor.
template <bool kPaged, typename Element>
PROXYATTN_DEVICE auto make_key_rows(const NeedProblem& p,
                                    const NeedSource& source,
                                    const Element* first) {
  KeyRows<Element> rows;
  rows.first = first + source.first_key * p.k_strides.token;
  rows.stride = p.k_strides.token;
  rows.count = source.num_keys;
  rows.aligned = p.k_aligned;
  if constexpr (kPaged) {
    return PagedKeyRows<Element>{rows, p.k_strides.batch, p.pages, source.sequence};
  } else {
    return rows;
  }
}

template <typename Element, int kHeadDim, bool kPaged>
__global__ void __launch_bounds__(LogitTraits<Element, kHeadDim>::kThreads,
                                  LogitTraits<Element, kHeadDim>::kBlocksPerSm)
    block_lse_kernel(const __grid_constant__ NeedProblem p) {
  using Traits = LogitTraits<Element, kHeadDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  int64_t idx = blockIdx.x;
  const int tile = static_cast<int>(idx % p.group_tiles);
  idx /= p.group_tiles;
  const int64_t kv_head = idx % p.kv_heads;
  idx /= p.kv_heads;
  const int chunk = static_cast<int>(idx % p.num_chunks);
  const int64_t batch = idx / p.num_chunks;
  const NeedSource source = p.source(chunk);
  const int chunk_key = (chunk - source.first_chunk) * p.chunk_keys;
  const int first_key = max(chunk_key, source.hidden_blocks(p.visibility, p.kv_block) * p.kv_block);
  const int end_key = min(chunk_key + p.chunk_keys, source.num_keys);
  if (first_key >= end_key) return;

  // A query head owns q_block rows of the tile, of which the first source.rows exist.
  const auto head_of = [&](int row) { return (tile * Traits::kTileRows + row) / p.q_block; };
  const auto* q = static_cast<const Element*>(p.q) + batch * p.q_strides.batch +
                  source.first_query * p.q_strides.token;
  RowSource<Element> halves[2];
  PROXYATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int first_row = half * Traits::kHalfRows;
    const int head_row = first_row % p.q_block;
    const bool exists = head_of(first_row) < p.group_heads;
    halves[half].first = q + (kv_head * p.group_heads + head_of(first_row)) * p.q_strides.head +
                         head_row * p.q_strides.token;
    halves[half].valid = exists ? min(max(source.rows - head_row, 0), Traits::kHalfRows) : 0;
  }
  LogitTiles<Traits> logits(shared);
  logits.load_rows(halves[0], halves[1], p.q_strides.token, p.q_aligned);

  const int first_row = static_cast<int>(threadIdx.x) / kWarpLanes * Traits::kWarpRows;
  const int head = head_of(first_row);
  const int64_t head_idx = (batch * p.kv_heads + kv_head) * p.group_heads + head;
  BlockLseConsumer<Traits> consumer{p};
  consumer.block_lse =
      head < p.group_heads
          ? p.block_lse + (head_idx * p.num_kv_blocks + source.first_block) * p.q_block
          : nullptr;
  consumer.warp_row = first_row % p.q_block;
  consumer.end_key = end_key;
  consumer.unmasked_keys = source.rows < p.q_block ? 0 : source.visible_keys(0);
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      consumer.limits[r][half] = source.visible_keys(Traits::row(r, half) % p.q_block);
    }
  }
  // Pages are entries of the tensor, and packed sequences one.
  const Element* keys =
      static_cast<const Element*>(p.k) + batch * p.k_strides.batch + kv_head * p.k_strides.head;
  logits.for_each_tile(make_key_rows<kPaged>(p, source, keys), first_key, end_key, consumer);
}

}  // namespace proxyattn::cuda
