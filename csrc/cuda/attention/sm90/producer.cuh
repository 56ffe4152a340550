// The producer warp: loads the key and value tiles that its scout has found.
//
// Order of loads in a tile: K0, K1, V0, K2, V1, ..., so that the keys of the next step are there
// when the values of this one are wanted. The whole warp walks the list; lane 0 talks to the
// barriers of the rings and to the copy engine.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/key_order.cuh"
#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/shared_storage.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
class Producer {
 public:
  PROXYATTN_DEVICE Producer(const Problem& problem, SharedStorage<Traits>& shared)
      : p_(problem), shared_(shared) {
    key_.phase = value_.phase = 1;
  }

  PROXYATTN_DEVICE void run() {
    while (true) {
      // Every lane waits and arrives for itself. None can miss a phase: the next order comes when
      // all have let go of this one.
      ptx::mbarrier_wait(&shared_.order_barriers.full[0], order_.phase,
                         ptx::WaitSite::kProducerOrder);
      __syncwarp();
      const KeyOrder& order = shared_.order;
      const int blocks = order.blocks;
      if (blocks == kNoMoreOrders) return;
      const Place place{order.batch, order.kv_head};
      BlockWalk walk(p_, order);
      ptx::mbarrier_arrive(&shared_.order_barriers.empty[0]);
      order_.next();
      load_tiles(place, walk, blocks);
    }
  }

 private:
  using Parts = TileParts<Traits>;

  struct Place {
    int batch;
    int kv_head;
  };

  // The whole warp goes on together: a lane left behind could find that the phase it waits for and
  // the one after it are both over, and would wait for ever.
  static PROXYATTN_DEVICE void wait(uint64_t* barrier, uint32_t phase, ptx::WaitSite site) {
    if (leads_warp()) ptx::mbarrier_wait(barrier, phase, site);
    __syncwarp();
  }

  PROXYATTN_DEVICE void load_tiles(const Place& place, BlockWalk& walk, int blocks) {
    const int steps = steps_of<Traits>(p_, blocks);
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
      load_key(place, parts);
      if (step > 0) load_value(place, previous);
      PROXYATTN_UNROLL
      for (int i = 0; i < Traits::kParts; ++i) previous[i] = parts[i];
    }
    if (steps > 0) load_value(place, previous);
  }

  PROXYATTN_DEVICE void load_key(const Place& place, const Parts& parts) {
    uint64_t* full = &shared_.key_barriers.full[key_.slot];
    wait(&shared_.key_barriers.empty[key_.slot], key_.phase, ptx::WaitSite::kProducerKey);
    if (leads_warp()) {
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
    }
    key_.next();
  }

  PROXYATTN_DEVICE void load_value(const Place& place, const Parts& parts) {
    uint64_t* full = &shared_.value_barriers.full[value_.slot];
    wait(&shared_.value_barriers.empty[value_.slot], value_.phase, ptx::WaitSite::kProducerValue);
    if (leads_warp()) {
      expect(full, parts);
      PROXYATTN_UNROLL
      for (int i = 0; i < Traits::kParts; ++i) {
        if (parts[i] == kNoPart) continue;
        load_rows(shared_.value[value_.slot] + i * Traits::kPartBytes, &p_.v_map, full, place,
                  parts[i], 0);
      }
    }
    value_.next();
  }

  static PROXYATTN_DEVICE void expect(uint64_t* full, const Parts& parts) {
    int loads = 0;
    PROXYATTN_UNROLL
    for (int i = 0; i < Traits::kParts; ++i) loads += parts[i] != kNoPart;
    ptx::mbarrier_arrive_expect(full, loads * Traits::kPartBytes);
  }

  PROXYATTN_DEVICE void load_rows(uint8_t* shared,
                                  const CUtensorMap* map,
                                  uint64_t* full,
                                  const Place& place,
                                  int part,
                                  int box) const {
    ptx::tma_load(shared, map, full, 0, part * Traits::kPartRows, box, place.kv_head, place.batch,
                  ptx::kEvictNormal);
  }

  const Problem& p_;
  SharedStorage<Traits>& shared_;
  Ring<1> order_;
  Ring<Traits::kKeyStages> key_;
  Ring<Traits::kValueStages> value_;
};

}  // namespace proxyattn::cuda::sm90
