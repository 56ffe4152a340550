// Block-sparse attention forward for every device from sm_80 on (mma.sync, cp.async):
//   out[i] = sum_j p_ij v_j / sum_j p_ij,  p_ij = exp(scale * q_i . k_j),  lse[i] = log sum_j p_ij
// over the keys j of the chosen blocks that query i can see.
//
// In: q [batch, q_len, q_heads, head_dim], k and v [batch, kv_len, kv_heads, head_dim], lists of
// key blocks. Out: out like q, lse [batch, q_heads, q_len]. Of packed sequences q, out and lse are
// one batch entry, and k and v one or an entry for each page; their kernels are of their own, since
// what a batch has once takes registers there.
//
// A thread block owns kTileRows consecutive queries of one head, inside one query block; a warp
// owns kWarpRows of them with all their scores and sums in registers. Key tiles of kTileKeys keys
// are walked list entry by list entry.
//
// Shared memory: the query tile, then a ring of kSlots tiles that takes K_0, V_0, K_1, V_1, ... in
// turn. Work goes in half steps, one tile each: wait for the tile, barrier, start the copy of the
// tile kSlots - 1 ahead, compute. Each half step commits one group of copies, an empty one when
// there is nothing to copy, so that the number of groups tells which tiles have landed.
//
// Keys and queries past the end are zeros in shared memory: they meet weights of 0 and must not be
// NaN. Key numbers are 32-bit (dispatch.cpp checks), offsets in global memory 64-bit.
#pragma once

#include <cstdint>

#include "proxyattn/attention.h"

#include "common/visibility.h"
#include "cuda/attention/block_list.cuh"
#include "cuda/attention/schedule.h"
#include "cuda/attention/sm80/epilogue.cuh"
#include "cuda/attention/sm80/products.cuh"
#include "cuda/attention/sm80/rows.cuh"
#include "cuda/attention/sm80/traits.h"
#include "cuda/common/key_rows.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/sequences/page_table.h"

namespace proxyattn::cuda::sm80 {

struct KernelParams {
  AttentionParams args;
  TileSchedule schedule;
  PackedSchedule packed;
  PageTable pages;
  int num_kv_blocks;  // of a batch entry
  float factor;       // scale * log2(e)
  // Rows that start at multiples of 16 bytes.
  bool q_aligned;
  bool k_aligned;
  bool v_aligned;
  bool out_aligned;
};

// First element of one head of a [batch, token, head, head_dim] tensor, at a token.
template <typename Element>
PROXYATTN_DEVICE Element* head_rows(Element* base,
                                    const TokenStrides& strides,
                                    int64_t batch_idx,
                                    int64_t head_idx,
                                    int64_t token) {
  return base + batch_idx * strides.batch + head_idx * strides.head + token * strides.token;
}

// What a thread block works on. It lies in shared memory, behind the tiles, since the main loop
// leaves no registers for numbers that are seldom needed.
template <typename Element>
struct BlockWork {
  QueryTile query;
  int q_start;            // token of query 0
  RowKeys<int> seen;      // by the tile's rows
  int list_row;           // query block, as lists number it
  int sequence;           // row of the page table
  const Element* keys;    // key 0 of the head; with pages: its row in page 0
  const Element* values;  // the same of values
};

template <bool kPacked, typename Element>
PROXYATTN_DEVICE void set_work(BlockWork<Element>& work, const KernelParams& params) {
  const AttentionParams& args = params.args;
  const Visibility<int64_t> visibility(args.causal, args.window);
  int64_t first_key = 0;
  if constexpr (kPacked) {
    const Sequence* sequence = params.packed.find(blockIdx.x, work.query);
    if (sequence == nullptr) {
      work.query.num_queries = 0;
      return;
    }
    first_key = sequence->kv_start;
    work.q_start = sequence->q_start;
    const int64_t position = int64_t{sequence->offset} + work.query.first_query;
    work.seen = visibility.rows(position, sequence->kv_len).narrow();
    work.list_row = sequence->first_q_block + work.query.q_block_idx;
    work.sequence = sequence->idx;
  } else {
    work.query = params.schedule.tile(blockIdx.x);
    work.q_start = 0;
    work.seen = visibility.rows(args.q_offset + work.query.first_query, args.kv_len).narrow();
    work.list_row = work.query.q_block_idx;
  }
  const int batch_idx = work.query.batch_idx;
  const int kv_head_idx = work.query.head_idx / static_cast<int>(params.schedule.group_heads);
  work.keys = head_rows(static_cast<const Element*>(args.k), args.k_strides, batch_idx, kv_head_idx,
                        first_key);
  work.values = head_rows(static_cast<const Element*>(args.v), args.v_strides, batch_idx,
                          kv_head_idx, first_key);
}

// Copies key and value tiles into the ring; tile number t goes to slot t % kSlots.
template <typename Traits, bool kPacked>
struct KeyValueRing {
  using Element = typename Traits::Element;

  const KernelParams& params;
  const BlockWork<Element>& work;
  uint32_t base;

  PROXYATTN_DEVICE uint32_t slot(int tile) const {
    return base + static_cast<uint32_t>(tile % Traits::kSlots * Traits::kSlotBytes);
  }

  PROXYATTN_DEVICE void load_keys(int tile, int first_key, int thread) const {
    load(work.keys, params.args.k_strides, params.k_aligned, tile, first_key, thread);
  }

  PROXYATTN_DEVICE void load_values(int tile, int first_key, int thread) const {
    load(work.values, params.args.v_strides, params.v_aligned, tile, first_key, thread);
  }

 private:
  PROXYATTN_DEVICE void load(const Element* first,
                             const TokenStrides& strides,
                             bool aligned,
                             int tile,
                             int first_key,
                             int thread) const {
    const int kv_len = kPacked ? work.seen.num_keys : static_cast<int>(params.args.kv_len);
    const KeyRows<Element> rows{first, strides.token, kv_len, aligned};
    if (kPacked && params.pages.pages != nullptr) {
      const PagedKeyRows<Element> paged{rows, strides.batch, params.pages, work.sequence};
      paged.template load<typename Traits::KeyLoader>(slot(tile), first_key, thread);
    } else {
      rows.template load<typename Traits::KeyLoader>(slot(tile), first_key, thread);
    }
  }
};

template <typename Traits, bool kPacked>
__global__ void __launch_bounds__(kThreads, Traits::kBlocksPerSm)
    attention_kernel(const __grid_constant__ KernelParams params) {
  using Element = typename Traits::Element;
  constexpr int kAhead = Traits::kSlots - 1;
  constexpr int kPending = kAhead - 1;  // groups younger than the tile that a half step needs
  static_assert(kAhead == 1 || kAhead == 2);
  static_assert(sizeof(BlockWork<Element>) <= kBlockWorkBytes);
  extern __shared__ __align__(1024) unsigned char shared_memory[];

  const int thread = static_cast<int>(threadIdx.x);
  auto& work = *reinterpret_cast<BlockWork<Element>*>(shared_memory + Traits::kTileBytes);
  if (thread == 0) set_work<kPacked>(work, params);
  // Shows thread 0's `work` to all.
  __syncthreads();
  const AttentionParams& args = params.args;
  const QueryTile& query = work.query;
  if (query.num_queries <= 0) return;
  const int lane = thread % kWarpLanes;
  const int warp_row = thread / kWarpLanes * Traits::kWarpRows;

  // Keys [all_begin, all_end) are seen by every row.
  const int last_row = query.num_queries - 1;
  const int all_begin = work.seen.begin(last_row);
  const int all_end = work.seen.end(0);
  const int kv_block = static_cast<int>(args.kv_block);
  const int num_blocks = kPacked ? ceil_div(work.seen.num_keys, kv_block) : params.num_kv_blocks;
  KeyTileWalk<kTileKeys> walk(
      args.indices == nullptr ? visible_blocks(work.seen, last_row, kv_block)
                              : chosen_blocks(args, query.batch_idx, query.head_idx, work.list_row),
      kv_block, num_blocks, work.seen.end(last_row));

  const uint32_t query_tile = ptx::shared_address(shared_memory);
  const uint32_t warp_queries =
      query_tile + Traits::Tile::kRowBytes * static_cast<uint32_t>(warp_row);
  const KeyValueRing<Traits, kPacked> ring{params, work, query_tile + Traits::kQueryBytes};

  int first_key = walk.next();
  if (first_key != walk.kEnd) {
    const Element* queries =
        head_rows(static_cast<const Element*>(args.q), args.q_strides, query.batch_idx,
                  query.head_idx, work.q_start + query.first_query);
    Traits::QueryLoader::load(query_tile, queries, args.q_strides.token, query.num_queries,
                              params.q_aligned, thread);
    ring.load_keys(0, first_key, thread);
    ptx::cp_async_commit();
    if constexpr (kAhead == 2) {
      ring.load_values(1, first_key, thread);
      ptx::cp_async_commit();
    }
  }

  RowState<Traits> state;
  typename Traits::Sums sums = {};
  const uint32_t query_fragment = warp_queries + row_fragment_offset<typename Traits::Tile>(lane);
  const uint32_t key_fragment = key_fragment_offset<typename Traits::Tile>(lane);
  const uint32_t value_fragment = row_fragment_offset<typename Traits::Tile>(lane);

  PROXYATTN_NO_UNROLL
  for (int tile = 0; first_key != walk.kEnd; tile += 2) {
    const int next_key = walk.next();

    // K of this step has landed in every thread, and every warp is done with the V before it,
    // whose slot takes the next copy.
    ptx::cp_async_wait<kPending>();
    __syncthreads();
    if constexpr (kAhead == 1) {
      ring.load_values(tile + 1, first_key, thread);
    } else if (next_key != walk.kEnd) {
      ring.load_keys(tile + 2, next_key, thread);
    }
    ptx::cp_async_commit();
    typename Traits::Scores scores;
    compute_scores<Traits>(scores, query_fragment, ring.slot(tile) + key_fragment);

    // V of this step has landed in every thread, and every warp is done with its K, whose slot
    // takes the next copy.
    ptx::cp_async_wait<kPending>();
    __syncthreads();
    if (next_key != walk.kEnd) {
      if constexpr (kAhead == 1) {
        ring.load_keys(tile + 2, next_key, thread);
      } else {
        ring.load_values(tile + 3, next_key, thread);
      }
    }
    ptx::cp_async_commit();
    if (first_key + kTileKeys > all_end) {
      hide_from_end<Traits>(scores, work.seen, warp_row, first_key, lane);
    }
    if (first_key < all_begin) {
      hide_before_begin<Traits>(scores, work.seen, warp_row, first_key, lane);
    }
    typename Traits::PerRow rescale;
    softmax_step<Traits>(scores, state, rescale, params.factor);
    // Packed before the branch in rescale_sums: half the registers of the scores are free after it.
    typename Traits::Weights weights;
    pack_weights<Traits>(weights, scores);
    rescale_sums<Traits>(sums, rescale);
    accumulate<Traits>(sums, weights, ring.slot(tile + 1) + value_fragment);
    first_key = next_key;
  }

  complete_sums<Traits>(state);
  if (args.sink_logits != nullptr) {
    join_sink<Traits>(sums, state, __ldg(args.sink_logits + query.head_idx), params.factor);
  }
  normalise<Traits>(sums, state);
  const int valid_rows = query.num_queries - warp_row;
  const int first_query = work.q_start + query.first_query + warp_row;  // token
  if (args.lse != nullptr) {
    const int64_t head_row = query.batch_idx * args.q_heads + query.head_idx;
    store_lse<Traits>(args.lse + head_row * args.lse_pitch + first_query, state, params.factor,
                      valid_rows, lane);
  }
  store_rows<Traits>(head_rows(static_cast<Element*>(args.out), args.out_strides, query.batch_idx,
                               query.head_idx, first_query),
                     args.out_strides.token, params.out_aligned, sums, warp_queries, valid_rows,
                     lane);
}

}  // namespace proxyattn::cuda::sm80
