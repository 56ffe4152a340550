// The producer warp: loads the query tiles that its scout found and the key and value tiles of their
// lists.
//
// Order of loads in a tile: Q, K0, K1, V0, K2, V1, ..., so that the keys of the next step are there
// when the values of this one are wanted. The whole warp walks the list; lane 0 talks to barriers
// and to the copy engine.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/shared_storage.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
class Producer {
 public:
  PROXYATTN_DEVICE Producer(const Problem& problem, SharedStorage<Traits>& shared)
      : p_(problem), shared_(shared) {
    query_.phase = key_.phase = value_.phase = 1;
  }

  PROXYATTN_DEVICE void run() {
    while (load_tile()) {
    }
    wait(&shared_.query_barriers.empty[query_.slot], query_.phase, ptx::WaitSite::kProducerQuery);
    if (leader()) {
      for (TileInfo& info : shared_.tiles[query_.slot]) info.steps = kNoMoreTiles;
      ptx::mbarrier_arrive(&shared_.query_barriers.full[query_.slot]);
    }
  }

 private:
  using Parts = TileParts<Traits>;

  // Of a query tile.
  struct Place {
    int row;  // query block
    int batch;
    int kv_head;
  };

  static PROXYATTN_DEVICE bool leader() { return (threadIdx.x & 31) == 0; }

  // The whole warp goes on together: a lane left behind could find that the phase it waits for and
  // the one after it are both over, and would wait for ever.
  PROXYATTN_DEVICE void wait(uint64_t* barrier, uint32_t phase, ptx::WaitSite site) const {
    if (leader()) ptx::mbarrier_wait(barrier, phase, site);
    __syncwarp();
  }

  // False if there is no tile any more.
  PROXYATTN_DEVICE bool load_tile() {
    wait(&shared_.order_barriers.full[0], order_.phase, ptx::WaitSite::kProducerOrder);
    const TileOrder& order = shared_.order;
    const Place place{order.row, order.batch, order.kv_head};
    if (place.row == kNoMoreRows) return false;
    BlockWalk walk(p_, order);
    const HeadBlocks heads[2] = {order.heads[0], order.heads[1]};
    release_slot(&shared_.order_barriers.empty[0]);
    order_.next();
    const int blocks = heads[0].blocks;
    const int steps = steps_of(blocks);
    shared_steps_ = steps_of(heads[1].blocks);
    load_query(place, heads);
    Parts parts, previous;
    int place_in_list = 0;
    int block = 0;
    int left = 0;  // key tiles of the block
    PROXYATTN_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      if constexpr (Traits::kLargeBlocks) {
        // From the block's end, as the blocks themselves usually come.
        if (left == 0) {
          left = p_.tiles_per_block;
          block = walk.block(place_in_list++, blocks);
        }
        parts[0] = block * p_.tiles_per_block + --left;
      } else {
        PROXYATTN_UNROLL
        for (int i = 0; i < Traits::kParts; ++i) {
          parts[i] = place_in_list < blocks ? walk.block(place_in_list, blocks) : kNoPart;
          ++place_in_list;
        }
      }
      load_key(place, step, parts);
      if (step > 0) load_value(place, step - 1, previous);
      PROXYATTN_UNROLL
      for (int i = 0; i < Traits::kParts; ++i) previous[i] = parts[i];
    }
    if (steps > 0) load_value(place, steps - 1, previous);
    if (Traits::kHeads > 1 && steps > shared_steps_) {
      wait_for_loads(key_, shared_.key_barriers);
      wait_for_loads(value_, shared_.value_barriers);
    }
    return true;
  }

  // Until what was loaded last has come into every slot. A warpgroup that skipped key tiles waits
  // for a slot's next tile by the parity of its phase, and would take the one before for it.
  template <int kStages>
  PROXYATTN_DEVICE void wait_for_loads(const Ring<kStages>& ring,
                                       RingBarriers<kStages>& barriers) const {
    for (int slot = 0; slot < kStages; ++slot) {
      // In slots that this lap has not reached it was the lap before.
      const uint32_t phase = slot < ring.slot ? ring.phase ^ 1 : ring.phase;
      wait(&barriers.full[slot], phase, ptx::WaitSite::kProducerLoads);
    }
  }

  PROXYATTN_DEVICE int steps_of(int blocks) const {
    return Traits::kLargeBlocks ? blocks * p_.tiles_per_block : ceil_div(blocks, Traits::kParts);
  }

  // Publishes the tile; its arrival on `full` makes TileInfo visible to the consumers.
  PROXYATTN_DEVICE void load_query(const Place& place, const HeadBlocks (&heads)[2]) {
    uint64_t* full = &shared_.query_barriers.full[query_.slot];
    wait(&shared_.query_barriers.empty[query_.slot], query_.phase, ptx::WaitSite::kProducerQuery);
    if (leader()) {
      const int steps = steps_of(heads[0].blocks);
      PROXYATTN_UNROLL
      for (int group = 0; group < kTeamGroups; ++group) {
        const HeadBlocks& h = heads[group];
        const int odd = Traits::kParts > 1 ? h.blocks % Traits::kParts : 0;
        const int mine = steps_of(h.blocks);
        shared_.tiles[query_.slot][group] =
            TileInfo{place.row, h.head, place.batch, mine, odd, steps - mine};
      }
      int loads = 0;
      PROXYATTN_UNROLL
      for (int i = 0; i < Traits::kHeads; ++i) loads += heads[i].blocks > 0;
      if (loads > 0) {
        ptx::mbarrier_arrive_expect(full, loads * Traits::kHeadBytes);
        PROXYATTN_UNROLL
        for (int i = 0; i < Traits::kHeads; ++i) {
          if (heads[i].blocks == 0) continue;
          ptx::tma_load(shared_.query[query_.slot] + i * Traits::kHeadBytes, &p_.q_map, full, 0,
                        place.row * Traits::kBlockRows, 0, heads[i].head, place.batch,
                        ptx::kEvictFirst);
        }
      } else {
        ptx::mbarrier_arrive(full);
      }
    }
    query_.next();
  }

  PROXYATTN_DEVICE void load_key(const Place& place, int step, const Parts& parts) {
    uint64_t* full = &shared_.key_barriers.full[key_.slot];
    uint64_t* empty = &shared_.key_barriers.empty[key_.slot];
    wait(empty, key_.phase, ptx::WaitSite::kProducerKey);
    if (leader()) {
      // The arrival below orders these stores before the consumers' reads.
      PROXYATTN_UNROLL
      for (int i = 0; i < Traits::kParts; ++i) shared_.key_parts[key_.slot][i] = parts[i];
      expect(full, parts);
      PROXYATTN_UNROLL
      for (int i = 0; i < Traits::kParts; ++i) {
        if (parts[i] == kNoPart) continue;
        // One box at a time where parts share boxes.
        PROXYATTN_UNROLL
        for (int box = 0; box < (Traits::kParts == 1 ? 1 : Traits::kBoxes); ++box) {
          load_rows(shared_.key[key_.slot] + box * Traits::kKeyBoxBytes + i * Traits::kPartBoxBytes,
                    &p_.k_map, full, place, parts[i], box);
        }
      }
      release_for_absent(empty, step);
    }
    key_.next();
  }

  PROXYATTN_DEVICE void load_value(const Place& place, int step, const Parts& parts) {
    uint64_t* full = &shared_.value_barriers.full[value_.slot];
    uint64_t* empty = &shared_.value_barriers.empty[value_.slot];
    wait(empty, value_.phase, ptx::WaitSite::kProducerValue);
    if (leader()) {
      expect(full, parts);
      PROXYATTN_UNROLL
      for (int i = 0; i < Traits::kParts; ++i) {
        if (parts[i] == kNoPart) continue;
        load_rows(shared_.value[value_.slot] + i * Traits::kPartBytes, &p_.v_map, full, place,
                  parts[i], 0);
      }
      release_for_absent(empty, step);
    }
    value_.next();
  }

  static PROXYATTN_DEVICE void expect(uint64_t* full, const Parts& parts) {
    int loads = 0;
    PROXYATTN_UNROLL
    for (int i = 0; i < Traits::kParts; ++i) loads += parts[i] != kNoPart;
    ptx::mbarrier_arrive_expect(full, loads * Traits::kPartBytes);
  }

  // The second warpgroup skips the tiles that only the first one's head reads.
  PROXYATTN_DEVICE void release_for_absent(uint64_t* empty, int step) const {
    if (Traits::kHeads > 1 && step >= shared_steps_) {
      ptx::mbarrier_arrive_many(empty, kConsumerWarps / kTeamGroups);
    }
  }

  PROXYATTN_DEVICE void load_rows(uint8_t* shared,
                                  const CUtensorMap* map,
                                  uint64_t* full,
                                  const Place& place,
                                  int part,
                                  int box) {
    ptx::tma_load(shared, map, full, 0, part * Traits::kPartRows, box, place.kv_head, place.batch,
                  ptx::kEvictNormal);
  }

  const Problem& p_;
  SharedStorage<Traits>& shared_;
  int shared_steps_ = 0;  // of the current query tile, that both warpgroups take
  Ring<1> order_;
  Ring<Traits::kQueryStages> query_;
  Ring<Traits::kKeyStages> key_;
  Ring<Traits::kValueStages> value_;
};

}  // namespace proxyattn::cuda::sm90
