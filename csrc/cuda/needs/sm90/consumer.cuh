// A consumer warpgroup: the log-sum of each of its rows over each key block of the item's chunk.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/needs/sm90/problem.h"
#include "cuda/needs/sm90/shared_storage.cuh"
#include "cuda/sm90/lane_keys.cuh"
#include "cuda/sm90/logit_tiles.cuh"
#include "cuda/sm90/row_sums.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits, int kBlockKeys>
class NeedConsumer {
  using Blocks = LaneBlocks<kBlockKeys>;
  static_assert(!Blocks::kBothRows);

 public:
  PROXYATTN_DEVICE NeedConsumer(const NeedProblem& problem, NeedStorage<Traits>& shared, int group)
      : p_(problem), shared_(shared), stream_(shared.logits, group), group_(group) {
    warp_ = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpLanes % 4, 0);
  }

  PROXYATTN_DEVICE void run() {
    while (true) {
      stream_.wait_query();
      const int num_tiles = read_beside(item().num_tiles);
      if (num_tiles == 0) return;
      const int first_tile = read_beside(item().first_tile);
      begin();
      PROXYATTN_NO_UNROLL
      for (int done = 0; done < num_tiles; done += kStretchTiles) {
        sums_.reset();
        stream_.for_each_tile(first_tile + done, min(kStretchTiles, num_tiles - done), *this);
      }
      stream_.release_query();
    }
  }

  // One product's logits.
  PROXYATTN_DEVICE void operator()(float (&s)[kLaneLogits], int tile) {
    if (tile >= first_rare_tile_) {
      if (tile >= read_beside(item().num_whole)) gather_lane_keys(s);
      if ((tile + 1) * kLogitKeys > warp_limit_) mask(s, tile);
    }
    typename Blocks::Values values;
    typename Blocks::Merged merged;
    sums_.template add<kBlockKeys>(s, p_.factor, values);
    Blocks::merge(values, merged, RowSumOp());
    if (tile < end_tile_) {
      out_[static_cast<int64_t>(tile) * (Blocks::kTileBlocks * p_.items.q_block())] =
          ptx::lg2(merged[0]) + sums_.reference_of(Blocks::row(warp_lane(), 0));
    }
  }

 private:
  PROXYATTN_DEVICE void mask(float (&s)[kLaneLogits], int tile) const {
    const int num_keys = read_beside(item().num_keys);
    const int limit = p_.causal ? warp_limit_ + warp_lane() / kQuadLanes : num_keys;
    mask_row_logits(s, tile * kLogitKeys + first_lane_key(),
                    {min(limit, num_keys), min(limit + 8, num_keys)});
  }

  // That is worked on: it stays in shared memory, for what is seldom asked.
  PROXYATTN_DEVICE const NeedItem& item() const { return shared_.items[stream_.query_slot()]; }

  PROXYATTN_DEVICE void begin() {
    const NeedItems& items = p_.items;
    const NeedRows rows(items, read_beside(item().row_tile) * Traits::kGroups + group_);
    const int warp_row = rows.row + warp_ * 16;
    const int num_keys = read_beside(item().num_keys);
    const int num_whole = read_beside(item().num_whole);
    const int position = read_beside(item().position);
    warp_limit_ = p_.causal ? min(num_keys, position + warp_row + 1) : num_keys;
    first_rare_tile_ = min(num_whole, warp_limit_ / kLogitKeys);

    const int lane = warp_lane();
    const int block = Blocks::block(lane, 0);
    const int row = warp_row + lane / kQuadLanes + 8 * Blocks::row(lane, 0);
    const int64_t head = read_beside(item().first_head) + rows.head;
    const int64_t place = head * p_.num_kv_blocks + read_beside(item().first_block) + block;
    out_ = p_.block_lse + place * items.q_block() + row;
    // With one block in the tile two lanes hold the same value.
    const bool mine = Blocks::kTileBlocks > 1 || (lane & 2) == 0;
    const int num_blocks = ceil_div(num_keys, kBlockKeys);
    end_tile_ = mine && rows.head < items.group_heads
                    ? ceil_div(num_blocks - block, Blocks::kTileBlocks)
                    : 0;
  }

  const NeedProblem& p_;
  NeedStorage<Traits>& shared_;
  LogitStream<Traits> stream_;
  RowSums sums_;
  float* out_;           // of the lane's row and of its block in tile 0
  int end_tile_;         // the lane's block is one of the sequence's in tiles before this
  int first_rare_tile_;  // tiles before this came whole, and every row sees all of their keys
  int warp_limit_;       // first key that the warp's first row must not see
  int group_;
  int warp_;
};

}  // namespace proxyattn::cuda::sm90
