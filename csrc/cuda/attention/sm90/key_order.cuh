// Which keys a team's producers are to load next, as the scout says, and how they walk them.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "cuda/attention/sm90/problem.h"
#include "cuda/common/macros.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/common/warp.cuh"

namespace proxyattn::cuda::sm90 {

// Whose keys.
struct KeyOwner {
  int batch;  // batch entry of the keys; with pages: row of the page table
  int kv_head;
  int kv_start;  // token of the first key
  int kv_len;
  int num_kv_blocks;
  int cut_parts;  // parts before this one hold keys that a window hides from some of the rows
};

struct KeyOrder {
  int blocks;  // key blocks to load; kNoMoreOrders: leave
  KeyOwner owner;
  const int32_t* list;  // null: last_block and those before it
  int last_block;
  int32_t entries[kWarpLanes];  // the list's first
};
inline constexpr int kNoMoreOrders = -1;

// Key tiles of so many key blocks.
template <typename Traits>
PROXYATTN_DEVICE int steps_of(const Problem& p, int blocks) {
  return Traits::kLargeBlocks ? blocks * p.tiles_per_block : ceil_div(blocks, Traits::kParts);
}

// The key blocks of one query tile: a list in global memory, or blocks from the last visible one
// down. One warp reads it together, 32 entries at a time.
class BlockWalk {
 public:
  PROXYATTN_DEVICE BlockWalk(const Problem& p, const KeyOrder& order, const KeyOwner& owner)
      : p_(p),
        owner_(owner),
        list_(order.list),
        ahead_(list_ == nullptr ? order.last_block : order.entries[warp_lane()]) {}

  // Block at place `i`; called by the whole warp with i counting up from 0. An entry
  // that names no block becomes num_kv_blocks: wholly outside the tensor, so it loads zeros and is
  // masked.
  PROXYATTN_DEVICE int block(int i) {
    if (list_ == nullptr) return ahead_ - i;
    if (i > 0 && i % kWarpLanes == 0) ahead_ = load_entry(p_, list_, i + warp_lane());
    const int entry = __shfl_sync(kAllLanes, ahead_, i % kWarpLanes);
    const int num_blocks = owner_.num_kv_blocks;
    return static_cast<unsigned>(entry) < static_cast<unsigned>(num_blocks) ? entry : num_blocks;
  }

  static PROXYATTN_DEVICE int load_entry(const Problem& p, const int32_t* list, int i) {
    return i < p.list_capacity ? __ldg(list + i) : 0;
  }

 private:
  const Problem& p_;
  const KeyOwner& owner_;
  const int32_t* list_;
  int ahead_;  // lane i holds entry i of the current 32; without a list the last block
};

}  // namespace proxyattn::cuda::sm90
