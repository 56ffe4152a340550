// The producer warps: load the key and value tiles that their scout has found.
//
// A team has one for keys and one for values if the producers' warpgroup has warps enough. One that
// loads both takes K0, K1, V0, K2, V1, ..., so that the keys of the next step are there when the
// values of this one are wanted. The whole warp walks the list; lane 0 talks to the barriers of the
// rings and to the copy engine, which takes a part of a tile at a time. Of pages it takes what a
// page has of a part, 64 columns at a time unless that is the whole part, and each lane asks for
// one such box. The warp issues them one after another, which takes longer than the copy engine
// does: with small pages it is what two warps are for.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/key_order.cuh"
#include "cuda/attention/sm90/key_place.cuh"
#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/shared_storage.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace proxyattn::cuda::sm90 {

// Of one warp.
enum class Loads { kKeys, kValues, kBoth };

template <typename Traits, Loads kLoads>
class Producer {
 public:
  PROXYATTN_DEVICE Producer(const Problem& problem, SharedStorage<Traits>& shared)
      : p_(problem), shared_(shared), owner_(shared.owners[kLoads == Loads::kValues]) {
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
      if (leads_warp()) owner_ = order.owner;
      BlockWalk walk(p_, order, owner_);
      __syncwarp();  // the owner is written
      ptx::mbarrier_arrive(&shared_.order_barriers.empty[0]);
      order_.next();
      load_tiles(KeyPlace{p_, owner_}, walk, blocks);
    }
  }

 private:
  using Parts = TileParts<Traits>;
  // The whole warp goes on together: a lane left behind could find that the phase it waits for and
  // the one after it are both over, and would wait for ever.
  static PROXYATTN_DEVICE void wait(uint64_t* barrier, uint32_t phase, ptx::WaitSite site) {
    if (leads_warp()) ptx::mbarrier_wait(barrier, phase, site);
    __syncwarp();
  }

  PROXYATTN_DEVICE void load_tiles(const KeyPlace& place, BlockWalk& walk, int blocks) {
    const int steps = steps_of<Traits>(p_, blocks);
    Parts parts;
    int page = 0;  // of this lane's box, with pages
    int block = 0;
    PROXYATTN_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      if constexpr (Traits::kLargeBlocks) {
        // From the block's end, as the blocks themselves usually come.
        const int in_block = step & (p_.tiles_per_block - 1);
        if (in_block == 0) block = walk.block(step / p_.tiles_per_block);
        parts[0] = (block + 1) * p_.tiles_per_block - 1 - in_block;
      } else {
        PROXYATTN_UNROLL
        for (int i = 0; i < Traits::kParts; ++i) {
          const int place_in_list = step * Traits::kParts + i;
          parts[i] = place_in_list < blocks ? walk.block(place_in_list) : kNoPart;
        }
      }
      const int page_before = page;
      if (place.is_paged()) page = place.page(first_key(parts));
      if constexpr (kLoads != Loads::kValues) load_key(place, parts, page);
      if constexpr (kLoads == Loads::kValues) load_value(place, parts, page);
      if constexpr (kLoads == Loads::kBoth) {
        if (step > 0) load_value_behind(place, 2, page_before);
      }
    }
    if (kLoads == Loads::kBoth && steps > 0) load_value_behind(place, 1, page);
  }

  // Of a key tile loaded so many tiles ago.
  PROXYATTN_DEVICE void load_value_behind(const KeyPlace& place, int tiles_before, int page) {
    wait_value_slot();
    Parts parts;
    read_key_parts(tiles_before, parts);
    fill_value(place, parts, page);
  }

  // Of a key tile loaded so many tiles ago, at most two. No other has come into its slot yet. A
  // barrier of the warp since then orders lane 0's stores before these reads.
  PROXYATTN_DEVICE void read_key_parts(int tiles_before, Parts& parts) const {
    const int slot = key_.slot - tiles_before;
    PROXYATTN_UNROLL
    for (int i = 0; i < Traits::kParts; ++i) {
      parts[i] = part_of(shared_.key_parts[slot < 0 ? slot + Traits::kKeyStages : slot][i]);
    }
  }

  PROXYATTN_DEVICE void load_key(const KeyPlace& place, const Parts& parts, int page) {
    uint64_t* full = &shared_.key_barriers.full[key_.slot];
    wait(&shared_.key_barriers.empty[key_.slot], key_.phase, ptx::WaitSite::kProducerKey);
    uint8_t* slot = shared_.key[key_.slot];
    if (leads_warp()) {
      // The arrival below orders these stores before the consumers' reads.
      PROXYATTN_UNROLL
      for (int i = 0; i < Traits::kParts; ++i) {
        const bool cut = parts[i] < place.owner.cut_parts;
        shared_.key_parts[key_.slot][i] = cut ? mark_cut(parts[i]) : parts[i];
      }
      expect(full, parts);
    }
    if (place.is_paged()) {
      __syncwarp();  // bytes are announced before any arrive
      load_page_box<Traits::kParts == 1>(slot, Traits::kPartBoxBytes, Traits::kKeyBoxBytes,
                                         &p_.k_map, full, place, parts, page);
    } else if (leads_warp()) {
      PROXYATTN_UNROLL
      for (int i = 0; i < Traits::kParts; ++i) {
        if (parts[i] == kNoPart) continue;
        // One box at a time where parts share boxes.
        PROXYATTN_UNROLL
        for (int box = 0; box < (Traits::kParts == 1 ? 1 : Traits::kBoxes); ++box) {
          load_part(slot + box * Traits::kKeyBoxBytes + i * Traits::kPartBoxBytes, &p_.k_map, full,
                    place, parts[i], box);
        }
      }
    }
    key_.next();
  }

  PROXYATTN_DEVICE void wait_value_slot() const {
    wait(&shared_.value_barriers.empty[value_.slot], value_.phase, ptx::WaitSite::kProducerValue);
  }

  PROXYATTN_DEVICE void load_value(const KeyPlace& place, const Parts& parts, int page) {
    wait_value_slot();
    fill_value(place, parts, page);
  }

  PROXYATTN_DEVICE void fill_value(const KeyPlace& place, const Parts& parts, int page) {
    uint64_t* full = &shared_.value_barriers.full[value_.slot];
    uint8_t* slot = shared_.value[value_.slot];
    if (leads_warp()) expect(full, parts);
    int tail = -1;
    int tail_part = kNoPart;
    PROXYATTN_UNROLL
    for (int i = 0; i < Traits::kParts; ++i) {
      if (!place.template has_tail<Traits::kPartRows>(parts[i])) continue;
      tail = i;
      tail_part = parts[i];
    }
    if (place.is_paged() || tail >= 0) __syncwarp();  // bytes are announced before any arrive
    if (tail >= 0) load_tail(slot + tail * Traits::kPartBytes, full, place, tail_part);
    if (place.is_paged()) {
      load_page_box<true>(slot, Traits::kPartBytes, Traits::kPartBoxBytes, &p_.v_map, full, place,
                          parts, page, tail);
    } else if (leads_warp()) {
      PROXYATTN_UNROLL
      for (int i = 0; i < Traits::kParts; ++i) {
        if (parts[i] == kNoPart || i == tail) continue;
        load_part(slot + i * Traits::kPartBytes, &p_.v_map, full, place, parts[i], 0);
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
  PROXYATTN_DEVICE void load_part(uint8_t* shared,
                                  const CUtensorMap* map,
                                  uint64_t* full,
                                  const KeyPlace& place,
                                  int part,
                                  int box) const {
    ptx::tma_load(shared, map, full, 0, place.token(part * Traits::kPartRows), box,
                  place.owner.kv_head, place.owner.batch, ptx::kEvictNormal);
  }

  // The boxes of a tile in pages are numbered by part, then by page, then by column: one a lane.
  PROXYATTN_DEVICE int lane_row() const {
    return (warp_lane() / Traits::kBoxes << p_.pages.load_rows_log2) % Traits::kPartRows;
  }
  PROXYATTN_DEVICE int lane_part() const {
    return (warp_lane() / Traits::kBoxes << p_.pages.load_rows_log2) / Traits::kPartRows;
  }
  PROXYATTN_DEVICE int first_key(const Parts& parts) const {
    const int part = Traits::kParts == 1 || lane_part() == 0 ? parts[0] : parts[Traits::kParts - 1];
    return part * Traits::kPartRows + lane_row();
  }

  // With kBoxesJoin a whole part's boxes follow one another in the slot, and come together.
  template <bool kBoxesJoin>
  PROXYATTN_DEVICE void load_page_box(uint8_t* slot,
                                      int part_bytes,
                                      int box_bytes,
                                      const CUtensorMap* map,
                                      uint64_t* full,
                                      const KeyPlace& place,
                                      const Parts& parts,
                                      int page,
                                      int left_out = -1) const {
    const int part = lane_part();
    if (part >= Traits::kParts || part == left_out) return;
    if (Traits::kParts > 1 && part > 0 && parts[Traits::kParts - 1] == kNoPart) return;
    const int box = warp_lane() % Traits::kBoxes;
    if (kBoxesJoin && box > 0 && 1 << p_.pages.load_rows_log2 == Traits::kPartRows) return;
    ptx::tma_load(slot + part * part_bytes + box * box_bytes + lane_row() * Traits::kBoxRowBytes,
                  map, full, 0, place.token_in_page(first_key(parts)), box, place.owner.kv_head,
                  page, ptx::kEvictNormal);
  }

  // Values row by row: those of keys, and zeros for the rows behind them.
  PROXYATTN_DEVICE void load_tail(uint8_t* shared,
                                  uint64_t* full,
                                  const KeyPlace& place,
                                  int part) const {
    PROXYATTN_NO_UNROLL
    for (int row = warp_lane(); row < Traits::kPartRows; row += kWarpLanes) {
      const int key = part * Traits::kPartRows + row;
      const int batch = place.is_paged() ? place.page(key) : place.owner.batch;
      const int token = place.is_paged() ? place.token_in_page(key) : place.token(key);
      PROXYATTN_NO_UNROLL
      for (int box = 0; box < Traits::kBoxes; ++box) {
        ptx::tma_load(shared + box * Traits::kPartBoxBytes + row * Traits::kBoxRowBytes,
                      &p_.v_row_map, full, 0, token, box, place.owner.kv_head, batch,
                      ptx::kEvictNormal);
      }
    }
  }

  const Problem& p_;
  SharedStorage<Traits>& shared_;
  KeyOwner& owner_;  // whose keys it loads; in shared memory, as a producer has few registers
  Ring<1> order_;
  Ring<Traits::kKeyStages> key_;
  Ring<Traits::kValueStages> value_;
};

}  // namespace proxyattn::cuda::sm90
