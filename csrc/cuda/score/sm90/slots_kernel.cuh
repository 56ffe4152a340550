// Packed sequences, before score_blocks: where each one's slots and row tiles begin, and which row
// tiles belong to each pass. One thread block.
#pragma once

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "cuda/common/macros.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/score/sm90/problem.h"

namespace proxyattn::cuda::sm90 {

inline constexpr int kSlotsThreads = 1024;
inline constexpr int kSlotsWarps = kSlotsThreads / kWarpLanes;

// The slots of a sequence's list; a whole warp.
PROXYATTN_DEVICE int count_list_slots(const ScoreProblem& p, const ScoreSpan& span, int row_tiles) {
  int slots = 0;
  for (int tile = warp_lane(); tile < row_tiles; tile += kWarpLanes) {
    slots += p.num_chunks(span, tile);
  }
  return group_sum<kWarpLanes>(slots);
}

// Row tiles of all lists whose first slot comes before `slot`; one thread.
PROXYATTN_DEVICE int count_tiles_before(const ScoreProblem& p, const ScoreSlots* slots, int slot) {
  int sequence = 0;
  for (int end = p.num_sequences; end - sequence > 1;) {
    const int middle = (sequence + end) / 2;
    (slots[middle].first_slot <= slot ? sequence : end) = middle;
  }
  const ScoreSlots own = slots[sequence];
  if (own.list_slots == 0) return own.first_tile;
  const int list = min((slot - own.first_slot) / own.list_slots, p.proxy_heads);
  if (list == p.proxy_heads) return slots[sequence + 1].first_tile;
  const ScoreSpan span = p.span_of(sequence);
  int first = own.first_slot + list * own.list_slots;
  int tiles = 0;
  for (; tiles < own.list_tiles && first < slot; ++tiles) {
    first += p.num_chunks(span, own.list_tiles - 1 - tiles);
  }
  return own.first_tile + list * own.list_tiles + tiles;
}

static __global__ void __launch_bounds__(kSlotsThreads)
    find_slots_kernel(const __grid_constant__ ScoreProblem p,
                      ScoreSlots* slots,
                      int32_t* pass_tiles,
                      int num_passes,
                      int pass_slots) {
  using Scan = cub::BlockScan<int, kSlotsThreads>;
  __shared__ typename Scan::TempStorage scratch;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread / kWarpLanes; i < p.num_sequences; i += kSlotsWarps) {
    const ScoreSpan span = p.span_of(i);
    const int row_tiles = ceil_div(span.num_rows, p.tile_rows);
    const int list_slots = count_list_slots(p, span, row_tiles);
    if (leads_warp()) slots[i] = {0, 0, list_slots, row_tiles};
  }
  __syncthreads();  // each sequence's own numbers are written
  int slots_before = 0;
  int tiles_before = 0;
  for (int first = 0; first <= p.num_sequences; first += kSlotsThreads) {
    const int i = first + thread;
    const bool exists = i < p.num_sequences;
    int slot = exists ? slots[i].list_slots * p.proxy_heads : 0;
    int tile = exists ? slots[i].list_tiles * p.proxy_heads : 0;
    int all_slots;
    int all_tiles;
    Scan(scratch).ExclusiveSum(slot, slot, all_slots);
    __syncthreads();  // the scan's scratch is free again
    Scan(scratch).ExclusiveSum(tile, tile, all_tiles);
    __syncthreads();  // and again
    if (i <= p.num_sequences) {
      if (!exists) slots[i] = {};
      slots[i].first_slot = slots_before + slot;
      slots[i].first_tile = tiles_before + tile;
    }
    slots_before += all_slots;
    tiles_before += all_tiles;
  }
  __syncthreads();  // all sums are written
  for (int pass = thread; pass <= num_passes; pass += kSlotsThreads) {
    pass_tiles[pass] = pass == num_passes ? slots[p.num_sequences].first_tile
                                          : count_tiles_before(p, slots, pass * pass_slots);
  }
}

}  // namespace proxyattn::cuda::sm90
