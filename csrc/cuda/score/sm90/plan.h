// How a call is cut into passes, and how much scratch that takes: for the host side of the family.
#pragma once

#include <cstdint>

#include "proxyattn/score.h"

#include "common/math.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {

// What one launch works on: row tiles [begin, end) of lists [first_list, first_list + num_lists).
struct ScorePass {
  int64_t first_list;
  int64_t num_lists;
  int64_t begin;
  int64_t end;
  int64_t list_slots;  // slots of each list
};

class ScorePlan {
 public:
  explicit ScorePlan(const ScoreParams& params);

  int64_t num_rows() const { return end_row_ - first_row_; }  // sampled queries
  int64_t first_row() const { return first_row_; }
  int64_t num_keys() const { return num_keys_; }
  int64_t first_limit() const { return first_limit_; }
  int64_t tile_rows() const { return tile_rows_; }
  int64_t chunk_shift() const { return chunk_shift_; }

  // Passes take a few whole lists each or, where scratch doesn't hold one, a part of one from its
  // last row tile to its first: the fewer lists, the more row tiles read a key from the cache.
  template <typename Visit>
  void for_each_pass(const Visit& visit) const {
    if (pass_lists_ == 0) return;
    for (int64_t list = 0; list < lists_; list += pass_lists_) {
      for (int64_t end = num_row_tiles(); end > 0;) {
        ScorePass pass = rows_ending(end);
        pass.first_list = list;
        pass.num_lists = min_of(pass_lists_, lists_ - list);
        visit(pass);
        end = pass.begin;
      }
    }
  }

  // Scratch: block_max, block_lse with mass, stretch_lse, and the passes' counters. A bound: of all
  // ranges of as many query blocks the last must need the most, whatever their shares are.
  int64_t block_bytes() const { return max_slots_ * slot_block_bytes_; }
  int64_t lse_bytes() const {
    return (max_places() / kStretchTiles) * tile_rows_ * int64_t{sizeof(float)};
  }
  int64_t counter_bytes() const { return max_passes_ * int64_t{sizeof(int32_t)}; }
  int64_t workspace_bytes() const {
    return (with_mass_ ? 2 : 1) * block_bytes() + lse_bytes() + counter_bytes();
  }
  // Slots of a pass times key tiles of a chunk at most: what kernels count with 32 bits.
  int64_t max_places() const { return max_slots_ << chunk_shift_; }

 private:
  int64_t num_row_tiles() const;
  int64_t num_chunks(int64_t row_tile) const;
  int64_t chunks_seen_by(int64_t row) const;
  int64_t visible_tiles(int64_t row) const;
  int64_t choose_chunk_shift(int64_t num_queries) const;
  int64_t most_slots() const;  // of a pass
  void choose_passes();
  void bound_scratch(int64_t whole_rows);
  ScorePass rows_ending(int64_t end) const;

  int64_t lists_;  // batch * proxy_heads
  int64_t first_row_;
  int64_t end_row_;
  int64_t num_keys_;
  int64_t first_limit_;
  int64_t tile_rows_;
  int64_t chunk_shift_;
  int64_t slot_block_bytes_;  // of block_max, and again of block_lse
  int64_t pass_lists_ = 0;
  int64_t wanted_slots_ = 0;  // of a list in a pass
  int64_t max_slots_ = 0;     // of a pass
  int64_t max_passes_ = 0;
  bool causal_;
  bool with_mass_;
};

}  // namespace proxyattn::cuda::sm90
