// Stage 3, what each head needs, first kernel: how the last queries spread over the key blocks.
//
//   block_lse[h, n, r] = log2 of the sum over the visible keys u of block n of 2^(factor * q . k_u)
//
// for query r of the last `rows` ones of head h, on all tokens; factor = scale * log2(e).
// block_lse is [batch * q_heads, kv_blocks, q_block], fp32, -inf where nothing is visible.
//
// A thread block owns 128 rows, which are one or two query heads of one kv head, and a chunk of
// whole key blocks. Key blocks don't depend on each other, so any split gives the same bits. The
// tiles of a kv head run side by side and read its keys from L2. Shared memory: the ring of
// LogitTiles.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "common/math.h"
#include "cuda/common/logits.cuh"
#include "cuda/common/warp.cuh"

namespace proxyattn::cuda {

struct NeedProblem {
  const void* q;  // the first of the last `rows` queries
  const void* k;
  float* block_lse;
  TokenStrides q_strides;
  TokenStrides k_strides;
  int64_t batch;
  int64_t kv_heads;
  int64_t group_heads;  // query heads of a kv head
  int64_t position;     // of row 0
  int rows;
  int q_block;
  int kv_block;
  int num_keys;
  int num_kv_blocks;
  int chunk_keys;  // a multiple of kv_block
  int num_chunks;
  int group_tiles;  // row tiles of a kv head
  float factor;     // scale * log2(e)
  bool causal;
  bool q_aligned;
  bool k_aligned;

  PROXYATTN_HOST_DEVICE int64_t q_heads() const { return kv_heads * group_heads; }

  // Keys [0, visible) that a row sees; none for one that does not exist.
  PROXYATTN_HOST_DEVICE int visible_keys(int row) const {
    if (row >= rows) return 0;
    if (!causal) return num_keys;
    return static_cast<int>(max_of<int64_t>(0, min_of<int64_t>(position + row + 1, num_keys)));
  }
};

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

template <typename Element, int kHeadDim>
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
  const int first_key = static_cast<int>(idx % p.num_chunks) * p.chunk_keys;
  const int64_t batch = idx / p.num_chunks;

  // A query head owns q_block rows of the tile, of which the first p.rows exist.
  const auto head_of = [&](int row) { return (tile * Traits::kTileRows + row) / p.q_block; };
  const auto* q = static_cast<const Element*>(p.q) + batch * p.q_strides.batch;
  RowSource<Element> halves[2];
  PROXYATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int first_row = half * Traits::kHalfRows;
    const int head_row = first_row % p.q_block;
    const bool exists = head_of(first_row) < p.group_heads;
    halves[half].first = q + (kv_head * p.group_heads + head_of(first_row)) * p.q_strides.head +
                         head_row * p.q_strides.token;
    halves[half].valid = exists ? min(max(p.rows - head_row, 0), Traits::kHalfRows) : 0;
  }
  LogitTiles<Traits> logits(shared);
  logits.load_rows(halves[0], halves[1], p.q_strides.token, p.q_aligned);

  const int first_row = static_cast<int>(threadIdx.x) / kWarpLanes * Traits::kWarpRows;
  const int head = head_of(first_row);
  const int64_t head_idx = (batch * p.kv_heads + kv_head) * p.group_heads + head;
  BlockLseConsumer<Traits> consumer{p};
  consumer.block_lse =
      head < p.group_heads ? p.block_lse + head_idx * p.num_kv_blocks * p.q_block : nullptr;
  consumer.warp_row = first_row % p.q_block;
  consumer.end_key = min(first_key + p.chunk_keys, p.num_keys);
  consumer.unmasked_keys = p.rows < p.q_block ? 0 : p.visible_keys(0);
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      consumer.limits[r][half] = p.visible_keys(Traits::row(r, half) % p.q_block);
    }
  }
  KeySource<Element> keys;
  keys.first =
      static_cast<const Element*>(p.k) + batch * p.k_strides.batch + kv_head * p.k_strides.head;
  keys.stride = p.k_strides.token;
  keys.count = p.num_keys;
  keys.aligned = p.k_aligned;
  logits.for_each_tile(keys, first_key, consumer.end_key, consumer);
}

}  // namespace proxyattn::cuda
