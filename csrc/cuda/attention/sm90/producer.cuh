// The producer warp: takes query tiles, loads them and the key and value tiles of their lists.
//
// Order of loads in a tile: Q, K0, K1, V0, K2, V1, ..., so that the keys of the next step are there
// when the values of this one are wanted. The whole warp walks the list; lane 0 talks to barriers
// and to the copy engine.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/scheduler.cuh"
#include "cuda/attention/sm90/shared_storage.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
class Producer {
 public:
  PROXYATTN_DEVICE Producer(const Problem& problem, SharedStorage<Traits>& shared, int team)
      : p_(problem), shared_(shared), team_(team), leader_((threadIdx.x & 31) == 0) {
    query_.phase = key_.phase = value_.phase = 1;
  }

  PROXYATTN_DEVICE void run() {
    const int num_teams = static_cast<int>(gridDim.x) * Traits::kTeams;
    for (int tile = blockIdx.x * Traits::kTeams + team_; tile < p_.num_tiles;) {
      // Asked for early: the answer travels while this tile's loads are issued.
      int next = 0;
      if (leader_) next = atomicAdd(p_.next_tile, 1) + num_teams;
      load_tile(TilePlace(p_, tile));
      tile = __shfl_sync(kFullWarp, next, 0);
    }
    ptx::mbarrier_wait(&shared_.query_barriers.empty[query_.slot], query_.phase,
                       ptx::WaitSite::kProducerQuery);
    if (leader_) {
      shared_.tiles[query_.slot].steps = kNoMoreTiles;
      ptx::mbarrier_arrive(&shared_.query_barriers.full[query_.slot]);
    }
  }

 private:
  PROXYATTN_DEVICE void load_tile(const TilePlace& place) {
    BlockWalk walk(p_, place);
    const int count = walk.count();
    load_query(place, count * p_.tiles_per_block);
    int previous = 0;
    for (int i = 0; i < count; ++i) {
      const int block = walk.block(i);
      // From the block's end, as the blocks themselves usually come.
      for (int part = p_.tiles_per_block - 1; part >= 0; --part) {
        const int key_tile = block * p_.tiles_per_block + part;
        load_key(place, key_tile);
        if (i > 0 || part < p_.tiles_per_block - 1) load_value(place, previous);
        previous = key_tile;
      }
    }
    if (count > 0) load_value(place, previous);
  }

  // Publishes the tile; its arrival on `full` makes TileInfo visible to the consumers.
  PROXYATTN_DEVICE void load_query(const TilePlace& place, int steps) {
    uint64_t* full = &shared_.query_barriers.full[query_.slot];
    ptx::mbarrier_wait(&shared_.query_barriers.empty[query_.slot], query_.phase,
                       ptx::WaitSite::kProducerQuery);
    if (leader_) {
      shared_.tiles[query_.slot] = TileInfo{place.row, place.head, place.batch, steps};
      if (steps > 0) {
        ptx::mbarrier_arrive_expect(full, Traits::kQueryTileBytes);
        ptx::tma_load(shared_.query[query_.slot], &p_.q_map, full, 0, place.row * kQueryRows, 0,
                      place.head, place.batch, ptx::kEvictFirst);
      } else {
        ptx::mbarrier_arrive(full);
      }
    }
    query_.next();
  }

  PROXYATTN_DEVICE void load_key(const TilePlace& place, int key_tile) {
    uint64_t* full = &shared_.key_barriers.full[key_.slot];
    ptx::mbarrier_wait(&shared_.key_barriers.empty[key_.slot], key_.phase,
                       ptx::WaitSite::kProducerKey);
    if (leader_) {
      // The arrival below orders this store before the consumers' read.
      shared_.key_tile[key_.slot] = key_tile;
      ptx::mbarrier_arrive_expect(full, Traits::kKeyTileBytes);
      load_rows(shared_.key[key_.slot], &p_.k_map, full, place, key_tile);
    }
    key_.next();
  }

  PROXYATTN_DEVICE void load_value(const TilePlace& place, int key_tile) {
    uint64_t* full = &shared_.value_barriers.full[value_.slot];
    ptx::mbarrier_wait(&shared_.value_barriers.empty[value_.slot], value_.phase,
                       ptx::WaitSite::kProducerValue);
    if (leader_) {
      ptx::mbarrier_arrive_expect(full, Traits::kKeyTileBytes);
      load_rows(shared_.value[value_.slot], &p_.v_map, full, place, key_tile);
    }
    value_.next();
  }

  PROXYATTN_DEVICE void load_rows(uint8_t* shared,
                                  const CUtensorMap* map,
                                  uint64_t* full,
                                  const TilePlace& place,
                                  int key_tile) {
    ptx::tma_load(shared, map, full, 0, key_tile * Traits::kKeyRows, 0, place.kv_head, place.batch,
                  ptx::kEvictNormal);
  }

  const Problem& p_;
  SharedStorage<Traits>& shared_;
  const int team_;
  const bool leader_;
  Ring<Traits::kQueryStages> query_;
  Ring<Traits::kKeyStages> key_;
  Ring<Traits::kValueStages> value_;
};

}  // namespace proxyattn::cuda::sm90
