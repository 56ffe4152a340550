// The order of items, walked from the first on.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/score/sm90/problem.h"

namespace proxyattn::cuda::sm90 {

// What the producer tells the consumers about an item.
struct __align__(16) ScoreItem {
  int slot;      // in scratch; kNoMoreItems: leave
  int row_tile;  // counted from the first row of the call
  int chunk;
  int num_tiles;  // key tiles to compute
};
inline constexpr int kNoMoreItems = -1;

PROXYATTN_DEVICE ScoreItem read_item(const ScoreItem& item) {
  return {read_beside(item.slot), read_beside(item.row_tile), read_beside(item.chunk),
          read_beside(item.num_tiles)};
}

// Items are taken in bands of a few row tiles, chunk by chunk, so that the thread blocks at work
// read a chunk's keys together: the keys of a long list are more than the cache holds. Every thread
// block meets items in rising order, so the producer steps from band to band rather than invert the
// number of items before one.
class ScoreWalk {
 public:
  PROXYATTN_DEVICE explicit ScoreWalk(const ScoreProblem& p) { begin_list(p); }

  PROXYATTN_DEVICE void advance_to(const ScoreProblem& p, int item) {
    while (item >= first_item_ + num_items_) {
      first_item_ += num_items_;
      last_tile_ -= kBandTiles;
      if (last_tile_ < p.first_row_tile) {
        ++list_;
        begin_list(p);
      } else {
        count_chunks(p);
      }
    }
  }

  PROXYATTN_DEVICE int list() const { return list_; }

  PROXYATTN_DEVICE ScoreItem item(const ScoreProblem& p, int idx) const {
    // A later row tile sees no fewer chunks: the first chunks are seen by the whole band, the next
    // by all but its earliest tile, and so on.
    int place = idx - first_item_;
    int chunk = 0;
    int tile = 0;  // of the band
    int slot = first_item_;
    PROXYATTN_UNROLL
    for (int width = kBandTiles; width > 0; --width) {
      const int end = chunks_[width - 1];
      const int items = (end - chunk) * width;
      if (place < items) {
        chunk += place / width;
        tile = place % width;
        break;
      }
      place -= items;
      chunk = end;
    }
    PROXYATTN_UNROLL
    for (int i = 0; i < kBandTiles - 1; ++i) slot += i < tile ? chunks_[i] : 0;
    const int row_tile = last_tile_ - tile;
    const int tiles = min(p.visible_tiles(row_tile) - chunk * p.chunk_tiles, p.chunk_tiles);
    return {slot + chunk, row_tile, chunk, tiles};
  }

 private:
  static constexpr int kBandTiles = 4;

  PROXYATTN_DEVICE void begin_list(const ScoreProblem& p) {
    last_tile_ = p.first_row_tile + p.num_row_tiles - 1;
    count_chunks(p);
  }

  PROXYATTN_DEVICE void count_chunks(const ScoreProblem& p) {
    num_items_ = 0;
    PROXYATTN_UNROLL
    for (int i = 0; i < kBandTiles; ++i) {
      const int row_tile = last_tile_ - i;
      chunks_[i] = row_tile >= p.first_row_tile ? p.num_chunks(row_tile) : 0;
      num_items_ += chunks_[i];
    }
  }

  int list_ = 0;
  int first_item_ = 0;      // of the band
  int num_items_;           // of the band
  int last_tile_;           // of the band; its other row tiles come before
  int chunks_[kBandTiles];  // that a row tile sees, from the last down
};

}  // namespace proxyattn::cuda::sm90
