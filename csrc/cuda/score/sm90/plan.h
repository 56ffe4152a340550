// How a call is cut into passes and items, and how much scratch that takes: for the host side of
// the family.
#pragma once

#include <cstdint>

#include "proxyattn/score.h"

namespace proxyattn::cuda::sm90 {

// Row tiles [begin, end) of every list: what one launch works on.
struct ScorePass {
  int64_t begin;
  int64_t end;
  int64_t list_items;  // items of each list
};

class ScorePlan {
 public:
  explicit ScorePlan(const ScoreParams& params);

  int64_t lists() const { return lists_; }
  int64_t num_rows() const { return end_row_ - first_row_; }  // sampled queries
  int64_t first_row() const { return first_row_; }
  int64_t num_keys() const { return num_keys_; }
  int64_t first_limit() const { return first_limit_; }
  int64_t tile_rows() const { return tile_rows_; }
  int64_t chunk_tiles() const { return chunk_tiles_; }

  // Passes go from the last row tile to the first: the first pass ends with num_row_tiles(), the
  // next where this one begins.
  int64_t num_row_tiles() const;
  ScorePass pass_ending(int64_t end) const;

  // Scratch, one behind the other; sized for the pass with the most items.
  int64_t block_bytes() const { return max_items_ * item_block_bytes_; }
  int64_t lse_bytes() const;
  int64_t counter_bytes() const { return num_passes_ * int64_t{sizeof(int32_t)}; }
  int64_t workspace_bytes() const;
  // Items of a pass times key tiles of a chunk at most: what kernels count with 32 bits.
  int64_t max_places() const { return max_items_ * chunk_tiles_; }

 private:
  int64_t visible_tiles(int64_t last_row) const;
  int64_t num_chunks(int64_t row_tile) const;
  int64_t choose_chunk_tiles(int64_t num_queries) const;

  int64_t lists_;  // batch * proxy_heads
  int64_t first_row_;
  int64_t end_row_;
  int64_t num_keys_;
  int64_t first_limit_;
  int64_t tile_rows_;
  int64_t chunk_tiles_;
  int64_t item_block_bytes_;  // of block_max, and again of block_lse
  int64_t max_items_ = 0;
  int64_t num_passes_ = 0;
  bool causal_;
  bool with_mass_;
};

}  // namespace proxyattn::cuda::sm90
