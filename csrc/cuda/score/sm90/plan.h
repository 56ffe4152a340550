// How a call is cut into passes, and how much scratch that takes: for the host side of the family.
#pragma once

#include <cstdint>

#include "proxyattn/score.h"

#include "common/math.h"
#include "cuda/score/sm90/span.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {

// What one launch works on: the row tiles whose first slot lies in [slots_begin, slots_end), which
// are [tiles_begin, tiles_end) of all lists. Of packed sequences the device knows which those are.
struct ScorePass {
  int64_t slots_begin;
  int64_t slots_end;
  int64_t tiles_begin;
  int64_t tiles_end;
};

class ScorePlan {
 public:
  explicit ScorePlan(const ScoreParams& params);

  bool is_packed() const { return packed_; }
  ScoreSpan span() const { return span_; }              // of a batch entry
  ScoreSlots slots() const { return entry_; }           // of the first one
  int64_t lists() const { return lists_; }              // of packed sequences: of each
  int64_t num_keys() const { return num_keys_; }        // sampled ones that k_proxy has
  int64_t num_queries() const { return num_queries_; }  // sampled ones that q_proxy has
  int64_t tile_rows() const { return tile_rows_; }
  int64_t chunk_shift() const { return chunk_shift_; }
  int64_t num_passes() const { return num_passes_; }
  int64_t pass_slots() const { return pass_slots_; }
  int64_t max_tiles() const { return max_tiles_; }  // row tiles of all lists

  // Passes of nearly even shares of the slots. A row tile belongs to the pass that its first slot
  // lies in; of the last pass are also those behind, which see nothing.
  template <typename Visit>
  void for_each_pass(const Visit& visit) const {
    for (int64_t i = 0; i < num_passes_; ++i) {
      const int64_t end = i + 1 == num_passes_ ? kNoEnd : (i + 1) * pass_slots_;
      visit(ScorePass{i * pass_slots_, end, tiles_before(i * pass_slots_), tiles_before(end)});
    }
  }

  // Scratch: block_max, block_lse with mass, stretch_lse, the passes' counters and, for packed
  // sequences, what the device finds out about slots. A bound: of all ranges of as many query
  // blocks the last must need the most, whatever their shares are.
  int64_t block_bytes() const { return max_slots_ * slot_block_bytes_; }
  int64_t lse_bytes() const {
    return (max_places() / kStretchTiles) * tile_rows_ * int64_t{sizeof(float)};
  }
  int64_t counter_bytes() const { return max_passes_ * int64_t{sizeof(int32_t)}; }
  int64_t slots_bytes() const;
  int64_t pass_tiles_bytes() const;
  int64_t workspace_bytes() const {
    return (with_mass_ ? 2 : 1) * block_bytes() + lse_bytes() + slots_bytes() + pass_tiles_bytes() +
           counter_bytes();
  }
  // Slots of a pass times key tiles of a chunk at most: what kernels count with 32 bits.
  int64_t max_places() const { return max_slots_ << chunk_shift_; }
  int64_t max_slots() const { return max_slots_; }

 private:
  static constexpr int64_t kNoEnd = 0x7fffffff;

  void plan_batch(const ScoreParams& p);
  void plan_packed(const ScoreParams& p);
  int64_t num_chunks(int64_t row_tile) const;
  int64_t chunks_seen_by(int64_t row) const;
  int64_t visible_tiles(int64_t row) const;
  int64_t choose_chunk_shift(int64_t tiles) const;
  int64_t tiles_before(int64_t slot) const;
  void cut(int64_t slots, int64_t longest, int64_t bound);

  bool packed_;
  int64_t count_;  // packed sequences
  int64_t lists_;
  int64_t tile_rows_;
  int64_t num_keys_ = 0;
  int64_t num_queries_ = 0;
  ScoreSpan span_{};
  ScoreSlots entry_{};
  int64_t chunk_shift_ = 0;
  int64_t tile_block_bytes_;      // of block_max for one key tile, and again of block_lse
  int64_t slot_block_bytes_ = 0;  // for a slot
  int64_t num_passes_ = 0;
  int64_t pass_slots_ = 0;
  int64_t max_slots_ = 0;  // of a pass
  int64_t max_passes_ = 0;
  int64_t max_tiles_ = 0;
  bool causal_;
  bool with_mass_;
};

}  // namespace proxyattn::cuda::sm90
