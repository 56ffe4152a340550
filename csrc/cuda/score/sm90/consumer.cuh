// A consumer warpgroup: the logits of its rows over the item's keys, reduced to one maximum (and
// one log-sum, if mass is wanted) for each row and key block, and the log-sum of each row.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/score/sm90/cells.cuh"
#include "cuda/score/sm90/problem.h"
#include "cuda/score/sm90/shared_storage.cuh"
#include "cuda/sm90/lane_keys.cuh"
#include "cuda/sm90/logit_tiles.cuh"
#include "cuda/sm90/row_sums.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits, int kBlockKeys, bool kWithMass>
class ScoreConsumer {
  using Blocks = LaneBlocks<kBlockKeys>;
  static constexpr int kTileFloats = Traits::kTileRows / kRowGroup * kGroupFloats<kBlockKeys>;

 public:
  PROXYATTN_DEVICE ScoreConsumer(const ScoreProblem& problem,
                                 ScoreStorage<Traits>& shared,
                                 int group)
      : p_(problem), shared_(shared), stream_(shared.logits, group) {
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpLanes % 4, 0);
    warp_row_ = group * kGroupRows + warp * kRowGroup;
  }

  PROXYATTN_DEVICE void run() {
    while (true) {
      stream_.wait_query();
      const ScoreItem item = read_item(shared_.items[stream_.query_slot()]);
      if (item.slot == kNoMoreItems) return;
      begin(item);
      const int first_tile = item.chunk << p_.chunk_shift;
      PROXYATTN_NO_UNROLL
      for (int done = 0; done < item.num_tiles; done += kStretchTiles) {
        sums_.reset();
        stream_.for_each_tile(first_tile + done, min(kStretchTiles, item.num_tiles - done), *this);
        store_sums(item.slot * p_.chunk_stretches() + done / kStretchTiles);
      }
      stream_.release_query();
    }
  }

  // One product's logits.
  PROXYATTN_DEVICE void operator()(float (&s)[kLaneLogits], int tile) {
    if (tile >= p_.keys.num_whole) gather_lane_keys(s);
    if ((tile + 1) * kLogitKeys > min(warp_limit_, num_keys_)) {
      const int limit = warp_limit_ + warp_lane() / kQuadLanes;
      mask_row_logits(s, tile * kLogitKeys + first_lane_key(),
                      {min(limit, num_keys_), min(limit + 8, num_keys_)});
    }
    const int place = first_place_ + tile * kTileFloats;
    typename Blocks::Values values;
    typename Blocks::Merged merged;
    find_block_maxima<kBlockKeys>(s, values);
    Blocks::merge(values, merged, RowMaxOp());
    store_values(p_.block_max + place, merged);
    float largest[2] = {values[0], values[1]};
    if constexpr (Blocks::kBlocks == 2) {
      largest[0] = fmaxf(largest[0], values[2]);
      largest[1] = fmaxf(largest[1], values[3]);
    }
    sums_.template add_below<kBlockKeys>(s, largest, p_.factor, values);
    if constexpr (kWithMass) {
      Blocks::merge(values, merged, RowSumOp());
      PROXYATTN_UNROLL
      for (int i = 0; i < Blocks::kCount; ++i) {
        merged[i] = ptx::lg2(merged[i]) + sums_.reference_of(Blocks::row(warp_lane(), i));
      }
      store_values(p_.block_lse + place, merged);
    }
  }

 private:
  PROXYATTN_DEVICE void begin(const ScoreItem& item) {
    first_place_ = ((item.slot - item.chunk) << p_.chunk_shift) * kTileFloats +
                   warp_row_ / kRowGroup * kGroupFloats<kBlockKeys> + warp_lane() * Blocks::kCount;
    num_keys_ = item.num_keys;
    warp_limit_ = p_.causal ? item.limit + warp_row_ : item.num_keys;
  }

  PROXYATTN_DEVICE void store_sums(int stretch) const {
    float* lse = p_.stretch_lse + static_cast<int64_t>(stretch) * Traits::kTileRows + warp_row_ +
                 warp_lane() / kQuadLanes;
    PROXYATTN_UNROLL
    for (int row = 0; row < 2; ++row) {
      const float sum = sums_.log2_sum(row);
      if (warp_lane() % kQuadLanes == 0) lse[8 * row] = sum;
    }
  }

  const ScoreProblem& p_;
  ScoreStorage<Traits>& shared_;
  LogitStream<Traits> stream_;
  RowSums sums_;
  int warp_row_;    // first row of the warp in the row tile
  int warp_limit_;  // first key that this row must not see
  int num_keys_;
  int first_place_;  // in scratch, of this thread's first row, if its slot began with key tile 0
};

}  // namespace proxyattn::cuda::sm90
