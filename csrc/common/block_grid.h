// The geometry of query and key blocks: which key blocks a query block can see, which of them are
// forced and in what order. Host and device code share this one statement of the rules.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace proxyattn {

struct BlockGrid {
  int64_t q_len;
  int64_t kv_len;
  int64_t q_block;
  int64_t kv_block;
  int64_t q_offset;  // position of query 0
  bool causal;

  PROXYATTN_HOST_DEVICE int64_t num_q_blocks() const { return ceil_div(q_len, q_block); }
  PROXYATTN_HOST_DEVICE int64_t num_kv_blocks() const { return ceil_div(kv_len, kv_block); }

  // Positions of the first and the last query of block m.
  PROXYATTN_HOST_DEVICE int64_t first_position(int64_t m) const { return q_offset + m * q_block; }
  PROXYATTN_HOST_DEVICE int64_t last_position(int64_t m) const {
    return q_offset + min_of((m + 1) * q_block, q_len) - 1;
  }

  // Key blocks [0, visible) that query block m can see.
  PROXYATTN_HOST_DEVICE int64_t visible(int64_t m) const {
    if (!causal) return num_kv_blocks();
    return min_of(last_position(m) / kv_block + 1, num_kv_blocks());
  }
};

// The forced blocks of one query block: the local ones [local_begin, visible), latest first, then
// the sink blocks [0, num_sinks), earliest first.
struct ForcedBlocks {
  int64_t visible;
  int64_t local_begin;
  int64_t num_sinks;

  PROXYATTN_HOST_DEVICE ForcedBlocks(const BlockGrid& grid,
                                     int64_t m,
                                     int64_t num_sink_blocks,
                                     int64_t num_local_blocks)
      : ForcedBlocks(
            grid, grid.first_position(m), grid.visible(m), num_sink_blocks, num_local_blocks) {}

  // Of a query block of exactly the last `num_queries` queries, wherever it begins.
  static PROXYATTN_HOST_DEVICE ForcedBlocks of_last_queries(const BlockGrid& grid,
                                                            int64_t num_queries,
                                                            int64_t num_sink_blocks,
                                                            int64_t num_local_blocks) {
    return {grid, grid.q_offset + grid.q_len - num_queries, grid.visible(grid.num_q_blocks() - 1),
            num_sink_blocks, num_local_blocks};
  }

  PROXYATTN_HOST_DEVICE ForcedBlocks(const BlockGrid& grid,
                                     int64_t first_position,
                                     int64_t num_visible,
                                     int64_t num_sink_blocks,
                                     int64_t num_local_blocks)
      : visible(num_visible), local_begin(visible), num_sinks(0) {
    if (grid.causal && num_local_blocks > 0) {
      const int64_t first = first_position / grid.kv_block;
      // No more than there are, so that any number will do.
      const int64_t before = min_of(num_local_blocks - 1, visible);
      local_begin = min_of(visible, max_of<int64_t>(0, first - before));
    }
    num_sinks = min_of(num_sink_blocks, local_begin);
  }

  PROXYATTN_HOST_DEVICE int64_t count() const { return visible - local_begin + num_sinks; }

  // Place of visible block n in the ranking if it is forced, else -1.
  PROXYATTN_HOST_DEVICE int64_t rank_of(int64_t n) const {
    if (n >= local_begin) return visible - 1 - n;
    if (n < num_sinks) return visible - local_begin + n;
    return -1;
  }

  // Block at place `rank` of the ranking, rank < count().
  PROXYATTN_HOST_DEVICE int64_t block_at(int64_t rank) const {
    const int64_t num_local = visible - local_begin;
    return rank < num_local ? visible - 1 - rank : rank - num_local;
  }
};

}  // namespace proxyattn
