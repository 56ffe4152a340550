// The scout warp of a team: takes query tiles, finds out what is to be read for them, loads the
// queries and has the producers load the keys.
//
// It works a tile ahead. A producer alone would wait for global memory three times, for the
// number of a tile, for its counts and list and for its queries, before anybody could begin.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/key_order.cuh"
#include "cuda/attention/sm90/pairs.cuh"
#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/shared_storage.cuh"
#include "cuda/attention/sm90/tile_order.h"
#include "cuda/attention/sm90/tile_walk.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
class Scout {
 public:
  PROXYATTN_DEVICE Scout(const Problem& problem, SharedStorage<Traits>& shared, int team)
      : p_(problem), shared_(shared), team_(team) {
    order_.phase = query_.phase = 1;
  }

  PROXYATTN_DEVICE void run() {
    TileWalk walk(p_);
    for (int tile = blockIdx.x * Traits::kTeams + team_; walk.advance_to(tile);) {
      if (leads_warp()) shared_.sequence = walk.sequence();
      __syncwarp();  // the sequence is written
      const TilePlace place = walk.place(sequence().kv_len, tile);
      HeadBlocks heads[2];
      give_order(place, heads);
      load_query(place, heads);
      // Taken when the producers have begun with the one before: who takes tiles early ends late.
      ptx::mbarrier_wait(&shared_.order_barriers.empty[0], order_.phase,
                         ptx::WaitSite::kScoutOrder);
      __syncwarp();
      int next = 0;
      if (leads_warp()) next = atomicAdd(p_.next_tile, 1) + p_.num_teams;
      tile = __shfl_sync(kAllLanes, next, 0);
    }
    dismiss();
  }

 private:
  // Of the tile; in shared memory, as a scout has few registers.
  PROXYATTN_DEVICE const Sequence& sequence() const { return shared_.sequence; }

  PROXYATTN_DEVICE void wait_query_slot() const {
    if (leads_warp()) {
      ptx::mbarrier_wait(&shared_.query_barriers.empty[query_.slot], query_.phase,
                         ptx::WaitSite::kScoutQuery);
    }
    __syncwarp();
  }

  PROXYATTN_DEVICE void give_order(const TilePlace& place, HeadBlocks (&heads)[2]) {
    KeyOrder& order = shared_.order;
    const int visible = name_keys(place, order);
    const int64_t list_row = sequence().first_q_block + place.row;
    const int32_t* list = nullptr;
    if (p_.indices != nullptr) {
      list = p_.indices + (place.list_idx(p_.tiles) * p_.list_rows + list_row) * p_.list_capacity;
    }
    int blocks = visible;  // lane i: of head i of those that may be in the tile
    int entry = 0;
    if (list != nullptr) {
      const int64_t head = place.head_idx(p_.tiles) + warp_lane();
      const int count =
          warp_lane() < p_.tiles.pair_group ? __ldg(p_.counts + head * p_.list_rows + list_row) : 0;
      entry = BlockWalk::load_entry(p_, list, warp_lane());
      blocks = min(max(count, 0), p_.list_capacity);
    }
    find_heads(place, blocks, heads);
    // A list of all visible blocks may be read in any order: the usual one, in which neighbouring
    // teams read the same keys.
    const int fewest = heads[1].head == kNoHead ? heads[0].blocks : heads[1].blocks;
    if (p_.rankings && fewest == visible) list = nullptr;
    order.entries[warp_lane()] = entry;
    if (leads_warp()) {
      order.blocks = heads[0].blocks;
      order.list = list;
    }
    pass_order();
  }

  // Whose keys are wanted, and how many blocks of them any row of the query block sees.
  PROXYATTN_DEVICE int name_keys(const TilePlace& place, KeyOrder& order) const {
    int visible = 0;
    if (leads_warp()) {
      const int first_query = place.row * Traits::kBlockRows;
      const int num_rows = min(Traits::kBlockRows, sequence().q_len - first_query);
      const RowKeys<int> keys =
          p_.visibility.rows(sequence().offset + first_query, sequence().kv_len);
      const KeyBlocks<int> seen = keys.blocks(num_rows - 1, p_.kv_block);
      shared_.block = BlockRows{num_rows, keys};
      order.owner = KeyOwner{p_.pages.table == nullptr ? place.batch : sequence().idx,
                             place.kv_head,
                             sequence().kv_start,
                             sequence().kv_len,
                             ceil_div(sequence().kv_len, p_.kv_block),
                             ceil_div(keys.begin(num_rows - 1), Traits::kPartRows)};
      order.last_block = seen.end - 1;
      visible = seen.end - seen.first;
    }
    return __shfl_sync(kAllLanes, visible, 0);
  }

  // Each lane's arrival orders what it wrote before the producers' reads.
  PROXYATTN_DEVICE void pass_order() {
    ptx::mbarrier_arrive(&shared_.order_barriers.full[0]);
    order_.next();
  }

  // Whose rows the warpgroups have, and how many key blocks each reads; the first reads no fewer.
  PROXYATTN_DEVICE void find_heads(const TilePlace& place,
                                   int blocks,
                                   HeadBlocks (&heads)[2]) const {
    if constexpr (Traits::kHeads == 1) {
      heads[0] = heads[1] = {place.head, __shfl_sync(kAllLanes, blocks, 0)};
    } else {
      find_pair(p_, blocks, place.pair, heads);
      PROXYATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (heads[i].head != kNoHead) heads[i].head += place.head;
      }
    }
  }

  // Publishes the tile; the arrival on `full` makes TileInfo visible to the consumers.
  PROXYATTN_DEVICE void load_query(const TilePlace& place, const HeadBlocks (&heads)[2]) {
    wait_query_slot();
    if (leads_warp()) {
      const int token = sequence().q_start + place.row * Traits::kBlockRows;
      shared_.rows[query_.slot] = shared_.block;
      const int steps = steps_of<Traits>(p_, heads[0].blocks);
      PROXYATTN_UNROLL
      for (int group = 0; group < kTeamGroups; ++group) {
        const HeadBlocks& h = heads[group];
        const int odd = Traits::kParts > 1 ? h.blocks % Traits::kParts : 0;
        const int mine = steps_of<Traits>(p_, h.blocks);
        shared_.tiles[query_.slot][group] =
            TileInfo{token, h.head, place.batch, mine, odd, steps - mine};
      }
      copy_query(place, token, heads);
    }
    query_.next();
  }

  PROXYATTN_DEVICE void copy_query(const TilePlace& place,
                                   int token,
                                   const HeadBlocks (&heads)[2]) const {
    uint64_t* full = &shared_.query_barriers.full[query_.slot];
    int loads = 0;
    PROXYATTN_UNROLL
    for (int i = 0; i < Traits::kHeads; ++i) loads += heads[i].blocks > 0;
    if (loads == 0) return ptx::mbarrier_arrive(full);
    ptx::mbarrier_arrive_expect(full, loads * Traits::kHeadBytes);
    PROXYATTN_UNROLL
    for (int i = 0; i < Traits::kHeads; ++i) {
      if (heads[i].blocks == 0) continue;
      ptx::tma_load(shared_.query[query_.slot] + i * Traits::kHeadBytes, &p_.q_map, full, 0, token,
                    0, heads[i].head, place.batch, ptx::kEvictFirst);
    }
  }

  // No tile is left: everybody may go.
  PROXYATTN_DEVICE void dismiss() {
    if (leads_warp()) shared_.order.blocks = kNoMoreOrders;
    pass_order();
    wait_query_slot();
    if (leads_warp()) {
      for (TileInfo& info : shared_.tiles[query_.slot]) info.steps = kNoMoreTiles;
      ptx::mbarrier_arrive(&shared_.query_barriers.full[query_.slot]);
    }
  }

  const Problem& p_;
  SharedStorage<Traits>& shared_;
  const int team_;
  Ring<1> order_;
  Ring<Traits::kQueryStages> query_;
};

}  // namespace proxyattn::cuda::sm90
