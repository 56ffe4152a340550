// The order of items, walked from the first on.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/score/sm90/problem.h"

namespace proxyattn::cuda::sm90 {

// What the producer tells the consumers about an item.
struct __align__(16) ScoreItem {
  int idx;       // kNoMoreItems: leave
  int row_tile;  // counted from the first row of the call
  int chunk;
  int num_tiles;  // key tiles to compute
};
inline constexpr int kNoMoreItems = -1;

PROXYATTN_DEVICE ScoreItem read_item(const ScoreItem& item) {
  return {read_beside(item.idx), read_beside(item.row_tile), read_beside(item.chunk),
          read_beside(item.num_tiles)};
}

// Every thread block meets items in rising order, so the producer steps from row tile to row tile
// rather than invert the number of items before one.
class ScoreWalk {
 public:
  PROXYATTN_DEVICE explicit ScoreWalk(const ScoreProblem& p)
      : row_tile_(last_tile(p)), num_chunks_(p.num_chunks(row_tile_)) {}

  PROXYATTN_DEVICE void advance_to(const ScoreProblem& p, int item) {
    while (item >= first_item_ + num_chunks_) {
      first_item_ += num_chunks_;
      if (--row_tile_ < p.first_row_tile) {
        row_tile_ = last_tile(p);
        ++list_;
      }
      num_chunks_ = p.num_chunks(row_tile_);
    }
  }

  PROXYATTN_DEVICE int list() const { return list_; }

  PROXYATTN_DEVICE ScoreItem item(const ScoreProblem& p, int idx) const {
    const int chunk = idx - first_item_;
    const int tiles = min(p.visible_tiles(row_tile_) - chunk * p.chunk_tiles, p.chunk_tiles);
    return {idx, row_tile_, chunk, tiles};
  }

 private:
  static PROXYATTN_DEVICE int last_tile(const ScoreProblem& p) {
    return p.first_row_tile + p.num_row_tiles - 1;
  }

  int list_ = 0;
  int row_tile_;
  int first_item_ = 0;
  int num_chunks_;
};

}  // namespace proxyattn::cuda::sm90
