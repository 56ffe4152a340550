// The order of items, walked from the first on.
#pragma once

#include "cuda/common/macros.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/score/sm90/problem.h"

namespace proxyattn::cuda::sm90 {

// A row tile times a chunk of keys.
struct ScoreItem {
  int slot;      // of the pass, in scratch; kNoMoreItems: leave
  int limit;     // causal: keys that the row tile's first row sees; otherwise num_keys
  int num_keys;  // of the sequence
  int chunk;
  int num_tiles;  // key tiles to compute
  // Not for consumers:
  int batch;
  int head;            // proxy head
  int first_row;       // in q_proxy
  int first_key_tile;  // of the sequence, in k_proxy
};
inline constexpr int kNoMoreItems = -1;

// What consumers want to know of it.
PROXYATTN_DEVICE ScoreItem read_item(const ScoreItem& item) {
  return {read_beside(item.slot), read_beside(item.limit), read_beside(item.num_keys),
          read_beside(item.chunk), read_beside(item.num_tiles)};
}

// Where a walk is, as far as that changes from band to band: in shared memory, since the scout has
// few registers.
struct ScoreStation {
  ScoreSpan span;  // of the sequence
  int sequence;
  int head;
  int first_slot;  // of the band
  int band_slots;
};

// The lanes of a warp that are before this one, added up.
PROXYATTN_DEVICE int add_lanes_before(int value) {
  int sum = value;
  PROXYATTN_UNROLL
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, distance);
    if (warp_lane() >= distance) sum += before;
  }
  return sum - value;
}

// Row tiles are taken in bands and a band's items column by column: a chunk for each row tile that
// sees it, so that the thread blocks at work read the same keys. The keys of a long list are more
// than the cache holds, and a band reads them once.
//
// Every thread block meets items in rising order, so a walk steps from column to column rather than
// invert the number of items before one. A whole warp walks: lane i knows of row tile i of the
// band, counted from its last, which is the longest.
class ScoreWalk {
 public:
  PROXYATTN_DEVICE ScoreWalk(const ScoreProblem& p, ScoreStation& station) : at_(station) {
    const int sequence = find_sequence(p);
    const ScoreSlots slots = p.slots_of(sequence);
    int head = slots.list_slots == 0 ? 0 : (p.pass_begin - slots.first_slot) / slots.list_slots;
    head = min(head, p.proxy_heads - 1);
    go_to(p, sequence, head, slots.first_slot + head * slots.list_slots);
    last_tile_ = slots.list_tiles - 1;
    begin_band(p);
  }

  // False behind the last item.
  PROXYATTN_DEVICE bool advance_to(const ScoreProblem& p, int item) {
    while (item >= first_item_ + width()) {
      if (width() > 0) {
        first_item_ += width();
        begin_column(chunk_ + 1);
      } else if (!next_band(p)) {
        return false;
      }
    }
    return true;
  }

  // Tells of the item that was advanced to; the whole warp calls, one lane writes.
  PROXYATTN_DEVICE void describe(const ScoreProblem& p, int idx, ScoreItem& item) const {
    const int lane = lead() + idx - first_item_;
    const int slot = __shfl_sync(kAllLanes, slot_, lane);
    if (!leads_warp()) return;
    const int row_tile = last_tile_ - lane;
    item.slot = slot + chunk_;
    item.limit = p.causal ? at_.span.first_limit + row_tile * p.tile_rows : at_.span.num_keys;
    item.num_keys = at_.span.num_keys;
    item.chunk = chunk_;
    item.num_tiles =
        min(p.visible_tiles(at_.span, row_tile) - (chunk_ << p.chunk_shift), p.chunk_tiles());
    item.batch = at_.span.batch;
    item.head = at_.head;
    item.first_row = at_.span.first_row + row_tile * p.tile_rows;
    item.first_key_tile = at_.span.first_key_tile;
  }

  // Of the item's row tile: the query block behind its last, counted in the call.
  PROXYATTN_DEVICE int end_block(const ScoreProblem& p, int idx) const {
    return (last_tile_ - (lead() + idx - first_item_) + 1) * p.tile_rows / p.block_rows;
  }
  PROXYATTN_DEVICE int list(const ScoreProblem& p) const {
    return at_.sequence * p.proxy_heads + at_.head;
  }

 private:
  static constexpr int kBandTiles = kWarpLanes;

  // The sequence that the pass begins in.
  PROXYATTN_DEVICE static int find_sequence(const ScoreProblem& p) {
    if (!p.is_packed()) {
      const int slots = p.proxy_heads * p.entry_slots.list_slots;
      return slots == 0 ? 0 : min(p.pass_begin / slots, p.num_sequences - 1);
    }
    int sequence = 0;
    while (true) {
      const int next = sequence + warp_lane() + 1;
      const bool passed = next < p.num_sequences && p.slots[next].first_slot <= p.pass_begin;
      const int skipped = __popc(__ballot_sync(kAllLanes, passed));
      sequence += skipped;
      if (skipped < kWarpLanes) return sequence;
    }
  }

  PROXYATTN_DEVICE void go_to(const ScoreProblem& p, int sequence, int head, int first_slot) {
    __syncwarp();  // nobody reads of the place before any more
    if (leads_warp()) at_ = {p.span_of(sequence), sequence, head, first_slot, 0};
    __syncwarp();  // the place is written
  }

  PROXYATTN_DEVICE void begin_band(const ScoreProblem& p) {
    const int row_tile = last_tile_ - warp_lane();
    chunks_ = row_tile >= 0 ? p.num_chunks(at_.span, row_tile) : 0;
    const int before = add_lanes_before(chunks_);
    const int first = at_.first_slot + before;
    if (warp_lane() == kWarpLanes - 1) at_.band_slots = before + chunks_;
    if (first < p.pass_begin || first >= p.pass_end) chunks_ = 0;
    slot_ = first - p.pass_begin;
    begin_column(0);
  }

  PROXYATTN_DEVICE int lead() const { return __ffs(static_cast<int>(seen_by_)) - 1; }
  PROXYATTN_DEVICE int width() const { return __popc(seen_by_); }

  // Earlier row tiles see no more chunks than later ones.
  PROXYATTN_DEVICE void begin_column(int chunk) {
    chunk_ = chunk;
    seen_by_ = __ballot_sync(kAllLanes, chunks_ > chunk);
  }

  PROXYATTN_DEVICE bool next_band(const ScoreProblem& p) {
    __syncwarp();  // the band's slots are written
    const int first_slot = at_.first_slot + at_.band_slots;
    int sequence = at_.sequence;
    int head = at_.head;
    last_tile_ -= kBandTiles;
    while (last_tile_ < 0) {
      if (++head == p.proxy_heads) {
        head = 0;
        if (++sequence == p.num_sequences) return false;
      }
      last_tile_ = p.slots_of(sequence).list_tiles - 1;
    }
    if (first_slot >= p.pass_end) return false;
    go_to(p, sequence, head, first_slot);
    begin_band(p);
    return true;
  }

  ScoreStation& at_;
  // The band:
  int last_tile_;  // its other row tiles come before
  int slot_;       // first one of the lane's row tile, in the pass
  int chunks_;     // that the lane's row tile sees, if it is of the pass
  // The column:
  int chunk_;
  unsigned seen_by_;  // lanes, which are neighbours
  int first_item_ = 0;
};

}  // namespace proxyattn::cuda::sm90
