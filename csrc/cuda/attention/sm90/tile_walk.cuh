// From the number of a query tile to its place, in a batch or among packed sequences.
//
// Packed sequences are taken one after another, from the one with the most keys down, each in the
// order that tile_order.h gives to a batch of its own. Every team meets tiles in rising order, so a
// walk steps from sequence to sequence rather than search; the whole warp looks, 32 at a time.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/tile_order.h"
#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"

namespace proxyattn::cuda::sm90 {

class TileWalk {
 public:
  PROXYATTN_DEVICE explicit TileWalk(const Problem& p) : p_(p) {}

  // False behind the last tile. Called by a whole warp, with rising numbers.
  PROXYATTN_DEVICE bool advance_to(int tile) {
    if (!is_packed()) return tile < p_.tiles.num_tiles;
    const int block = tile / block_tiles();
    while (block >= blocks_end_) {
      const int next = place_ + warp_lane() + 1;
      const int end = next <= p_.packed.count ? __ldg(p_.packed.blocks_before + next) : kNoEnd;
      const int passed = __popc(__ballot_sync(kAllLanes, end <= block));
      place_ += passed;
      if (place_ >= p_.packed.count) return false;
      if (passed == kWarpLanes) continue;
      blocks_end_ = __shfl_sync(kAllLanes, end, passed);
    }
    return true;
  }

  // Of the tile that was advanced to.
  PROXYATTN_DEVICE Sequence sequence() const {
    if (!is_packed()) return p_.sequence;
    return p_.packed.sequences[__ldg(p_.packed.order + place_)];
  }

  PROXYATTN_DEVICE TilePlace place(int kv_len, int tile) const {
    if (!is_packed()) return {p_.tiles, tile};
    TileOrder own = p_.tiles;
    own.num_rows = blocks_end_ - __ldg(p_.packed.blocks_before + place_);
    own.section_kv = max(1, min(own.num_kv, p_.cached_keys / max(1, kv_len)));
    return {own, tile - (blocks_end_ - own.num_rows) * block_tiles()};
  }

 private:
  static constexpr int kNoEnd = 0x7fffffff;

  PROXYATTN_DEVICE bool is_packed() const { return p_.packed.count > 0; }
  // Query tiles of a query block of a packed sequence.
  PROXYATTN_DEVICE int block_tiles() const { return p_.tiles.num_kv * p_.tiles.tiles_per_kv_row; }

  const Problem& p_;
  int place_ = 0;       // of the sequence, from the longest
  int blocks_end_ = 0;  // query blocks of the sequences up to it
};

}  // namespace proxyattn::cuda::sm90
