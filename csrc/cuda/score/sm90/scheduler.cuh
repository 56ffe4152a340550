// The order of items, walked from the first on.
#pragma once

#include "cuda/common/macros.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/score/sm90/problem.h"

namespace proxyattn::cuda::sm90 {

// A row tile times a chunk of keys.
struct ScoreItem {
  int slot;      // in scratch; kNoMoreItems: leave
  int row_tile;  // counted from the first row of the call
  int chunk;
  int num_tiles;  // key tiles to compute
  int batch;
  int head;  // proxy head
};
inline constexpr int kNoMoreItems = -1;

// What consumers want to know of it.
PROXYATTN_DEVICE ScoreItem read_item(const ScoreItem& item) {
  return {read_beside(item.slot), read_beside(item.row_tile), read_beside(item.chunk),
          read_beside(item.num_tiles)};
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
  PROXYATTN_DEVICE explicit ScoreWalk(const ScoreProblem& p)
      : batch_(p.first_list / p.proxy_heads),
        head_(p.first_list % p.proxy_heads),
        last_tile_(p.first_row_tile + p.num_row_tiles - 1) {
    begin_band(p);
  }

  // False behind the last item.
  PROXYATTN_DEVICE bool advance_to(const ScoreProblem& p, int item) {
    while (item >= first_item_ + width_) {
      if (width_ > 0) {
        first_item_ += width_;
        begin_column(chunk_ + 1);
      } else if (!next_band(p)) {
        return false;
      }
    }
    return true;
  }

  PROXYATTN_DEVICE ScoreItem item(const ScoreProblem& p, int idx) const {
    const int place = idx - first_item_;
    const int row_tile = last_tile_ - place;
    const int slot = first_slot_ + count_slots(place) + chunk_;
    const int tiles = min(p.visible_tiles(row_tile) - (chunk_ << p.chunk_shift), p.chunk_tiles());
    return {slot, row_tile, chunk_, tiles, batch_, head_};
  }

 private:
  static constexpr int kBandTiles = kWarpLanes;

  // Of the band's last row tiles.
  PROXYATTN_DEVICE int count_slots(int row_tiles) const {
    return __reduce_add_sync(kAllLanes, warp_lane() < row_tiles ? chunks_ : 0);
  }

  PROXYATTN_DEVICE void begin_band(const ScoreProblem& p) {
    const int row_tile = last_tile_ - warp_lane();
    chunks_ = row_tile >= p.first_row_tile ? p.num_chunks(row_tile) : 0;
    begin_column(0);
  }

  // Earlier row tiles see no more chunks than later ones.
  PROXYATTN_DEVICE void begin_column(int chunk) {
    chunk_ = chunk;
    width_ = __popc(__ballot_sync(kAllLanes, chunks_ > chunk));
  }

  PROXYATTN_DEVICE bool next_band(const ScoreProblem& p) {
    first_slot_ += count_slots(kBandTiles);
    if (first_slot_ == p.num_lists * p.num_list_slots) return false;
    last_tile_ -= kBandTiles;
    if (last_tile_ < p.first_row_tile) {
      last_tile_ = p.first_row_tile + p.num_row_tiles - 1;
      if (++head_ == p.proxy_heads) {
        head_ = 0;
        ++batch_;
      }
    }
    begin_band(p);
    return true;
  }

  int batch_;
  int head_;
  // The band:
  int last_tile_;  // its other row tiles come before
  int first_slot_ = 0;
  int chunks_;  // that the lane's row tile sees
  // The column:
  int chunk_;
  int width_;  // row tiles that see it
  int first_item_ = 0;
};

}  // namespace proxyattn::cuda::sm90
