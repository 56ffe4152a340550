// A consumer warpgroup: the logits of its rows over the item's keys, reduced to one maximum (and
// one log-sum, if mass is wanted) for each row and key block, and the log-sum of each row.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/score/sm90/cells.cuh"
#include "cuda/score/sm90/problem.h"
#include "cuda/score/sm90/shared_storage.cuh"
#include "cuda/sm90/logit_tiles.cuh"
#include "cuda/sm90/row_sums.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits, int kBlockKeys, bool kWithMass>
class ScoreConsumer {
  using Layout = CellLayout<kBlockKeys>;
  static constexpr int kTileFloats = Traits::kTileRows / kRowGroup * Layout::kGroupFloats;
  using Merged = typename Layout::Lane::Values;

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
      stream_.for_each_tile(item.chunk * p_.chunk_tiles, item.num_tiles, *this);
      stream_.release_query();
      store_sums(item);
    }
  }

  // One product's logits.
  PROXYATTN_DEVICE void operator()(float (&s)[Traits::kLogits], int tile) {
    if ((tile + 1) * kLogitKeys > min(warp_limit_, p_.num_keys)) {
      const int limit = warp_limit_ + lane() / 4;
      mask_row_logits(s, tile * kLogitKeys + lane() % 4 * 2,
                      {min(limit, p_.num_keys), min(limit + 8, p_.num_keys)});
    }
    const int place = first_place_ + tile * kTileFloats;
    Merged merged;
    float largest[2] = {kMinusInfinity, kMinusInfinity};
    PROXYATTN_UNROLL
    for (int part = 0; part < Layout::kParts; ++part) {
      typename Layout::Tile::PartValues maxima;
      find_block_maxima<kBlockKeys>(s, part, maxima);
      PROXYATTN_UNROLL
      for (int i = 0; i < 2 * Layout::Tile::kPartBlocks; ++i) {
        largest[i % 2] = fmaxf(largest[i % 2], maxima[i]);
      }
      merge_quad<Layout::Tile::kPartBlocks>(maxima, merged, RowMaxOp());
      store_values(p_.block_max + place + part * Layout::kPartFloats, merged);
    }
    if constexpr (kWithMass) {
      // The sums of blocks come last, so waiting for the maxima first would cost more than it
      // frees. Called again with a part, this overwrites what it stored.
      sums_.template add<kBlockKeys>(
          s, p_.factor, [&](int part, const typename Layout::Tile::PartValues& values) {
            merge_quad<Layout::Tile::kPartBlocks>(values, merged, RowSumOp());
            store_block_lse(merged, place + part * Layout::kPartFloats);
          });
    } else {
      sums_.template add_below<kBlockKeys>(s, largest, p_.factor);
    }
  }

 private:
  static PROXYATTN_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarpLanes; }

  PROXYATTN_DEVICE void store_block_lse(Merged& sums, int place) const {
    PROXYATTN_UNROLL
    for (int i = 0; i < Layout::Lane::kCount; ++i) {
      const bool lower = ((Layout::Lane::first(lane()) + i) & 1) != 0;
      sums[i] = ptx::lg2(sums[i]) + (lower ? sums_.reference[1] : sums_.reference[0]);
    }
    store_values(p_.block_lse + place, sums);
  }

  PROXYATTN_DEVICE void begin(const ScoreItem& item) {
    first_place_ = (item.slot - item.chunk) * p_.chunk_tiles * kTileFloats +
                   warp_row_ / kRowGroup * Layout::kGroupFloats + lane() * Layout::Lane::kCount;
    const int first_row = p_.first_row + item.row_tile * p_.tile_rows + warp_row_;
    warp_limit_ = p_.causal ? p_.first_limit + first_row : p_.num_keys;
    sums_.reset();
  }

  PROXYATTN_DEVICE void store_sums(const ScoreItem& item) const {
    float* lse =
        p_.chunk_lse + static_cast<int64_t>(item.slot) * Traits::kTileRows + warp_row_ + lane() / 4;
    PROXYATTN_UNROLL
    for (int row = 0; row < 2; ++row) {
      const float sum = sums_.log2_sum(row);
      if (lane() % 4 == 0) lse[8 * row] = sum;
    }
  }

  const ScoreProblem& p_;
  ScoreStorage<Traits>& shared_;
  LogitStream<Traits> stream_;
  RowSums sums_;
  int warp_row_;     // first row of the warp in the row tile
  int warp_limit_;   // first key that this row must not see
  int first_place_;  // in scratch, of this thread's first row, if its slot began with key tile 0
};

}  // namespace proxyattn::cuda::sm90
