// The scout warp of a team: takes query tiles and finds out what their lists say, a tile ahead of
// the producer, which would otherwise wait for global memory three times before it can load.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/pairs.cuh"
#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/scheduler.cuh"
#include "cuda/attention/sm90/shared_storage.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
class Scout {
 public:
  PROXYATTN_DEVICE Scout(const Problem& problem, SharedStorage<Traits>& shared, int team)
      : p_(problem), shared_(shared), team_(team) {
    order_.phase = 1;
  }

  PROXYATTN_DEVICE void run() {
    for (int tile = blockIdx.x * Traits::kTeams + team_; tile < p_.num_tiles;) {
      give_order(TilePlace(p_, tile));
      // Taken when the producer has begun with the one before: who takes tiles early ends late.
      wait_for_producer();
      int next = 0;
      if (leader()) next = atomicAdd(p_.next_tile, 1) + p_.num_teams;
      tile = __shfl_sync(kFullWarp, next, 0);
    }
    if (leader()) shared_.order.row = kNoMoreRows;
    pass_on();
  }

 private:
  static PROXYATTN_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarpLanes; }
  static PROXYATTN_DEVICE bool leader() { return lane() == 0; }

  PROXYATTN_DEVICE void wait_for_producer() {
    if (leader()) {
      ptx::mbarrier_wait(&shared_.order_barriers.empty[0], order_.phase,
                         ptx::WaitSite::kScoutOrder);
    }
    __syncwarp();
  }

  // The arrival orders what all lanes wrote before the producer's reads.
  PROXYATTN_DEVICE void pass_on() {
    __syncwarp();
    if (leader()) ptx::mbarrier_arrive(&shared_.order_barriers.full[0]);
    order_.next();
  }

  PROXYATTN_DEVICE void give_order(const TilePlace& place) {
    const int visible = place.visible_blocks(p_, Traits::kBlockRows);
    const int32_t* list = p_.indices == nullptr ? nullptr : place.list(p_);
    int blocks = visible;  // lane i: of head i of those that may be in the tile
    int entry = 0;
    if (list != nullptr) {
      // Fits 32 bits: lanes are few, and rows no more than tokens.
      const int count = lane() < p_.pair_group ? __ldg(place.counts(p_) + lane() * p_.num_rows) : 0;
      entry = BlockWalk::load_entry(p_, list, lane());
      blocks = min(max(count, 0), p_.list_capacity);
    }
    HeadBlocks heads[2];
    find_heads(place, blocks, heads);
    // A list of all visible blocks may be read in any order: the usual one, in which neighbouring
    // teams read the same keys.
    const int fewest = heads[1].head == kNoHead ? heads[0].blocks : heads[1].blocks;
    if (p_.rankings && fewest == visible) list = nullptr;
    TileOrder& order = shared_.order;
    order.entries[lane()] = entry;
    if (leader()) {
      order.row = place.row;
      order.batch = place.batch;
      order.kv_head = place.kv_head;
      order.heads[0] = heads[0];
      order.heads[1] = heads[1];
      order.list = list;
    }
    pass_on();
  }

  // Whose rows the warpgroups have, and how many key blocks each reads; the first reads no fewer.
  PROXYATTN_DEVICE void find_heads(const TilePlace& place,
                                   int blocks,
                                   HeadBlocks (&heads)[2]) const {
    if constexpr (Traits::kHeads == 1) {
      heads[0] = heads[1] = {place.head, __shfl_sync(kFullWarp, blocks, 0)};
    } else {
      find_pair(p_, blocks, place.pair, heads);
      PROXYATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (heads[i].head != kNoHead) heads[i].head += place.head;
      }
    }
  }

  const Problem& p_;
  SharedStorage<Traits>& shared_;
  const int team_;
  Ring<1> order_;
};

}  // namespace proxyattn::cuda::sm90
