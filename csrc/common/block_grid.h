// The geometry of query and key blocks: which key blocks a query block can see, which of them are
// forced and in what order. Host and device code share this one statement of the rules.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace proxyattn {

// Neighbouring queries, by the positions of the first and the last of them.
struct QuerySpan {
  int64_t first;
  int64_t last;
};

// Blocks are of 1 to 1024 tokens. Everything else may be any number, as lengths may come from where
// nobody can check them: counts are never negative, places never outside, and nothing overflows.
struct BlockGrid {
  int64_t q_len;
  int64_t kv_len;
  int64_t q_block;
  int64_t kv_block;
  int64_t q_offset;  // position of query 0
  bool causal;

  PROXYATTN_HOST_DEVICE int64_t num_q_blocks() const { return ceil_div(tokens(q_len), q_block); }
  PROXYATTN_HOST_DEVICE int64_t num_kv_blocks() const { return ceil_div(tokens(kv_len), kv_block); }

  // Positions of the first and the last query of block m.
  PROXYATTN_HOST_DEVICE int64_t first_position(int64_t m) const {
    return offset() + clamp(m, 0, kManyBlocks) * q_block;
  }
  PROXYATTN_HOST_DEVICE int64_t last_position(int64_t m) const {
    const int64_t end = (clamp(m, -1, kManyBlocks) + 1) * q_block;
    return offset() + min_of(end, tokens(q_len)) - 1;
  }
  PROXYATTN_HOST_DEVICE QuerySpan queries(int64_t m) const {
    return {first_position(m), last_position(m)};
  }
  // As many queries as a whole block has, or all, up to the last one: they may lie in two blocks.
  PROXYATTN_HOST_DEVICE QuerySpan last_queries() const {
    const int64_t end = offset() + tokens(q_len);
    return {end - min_of(q_block, tokens(q_len)), end - 1};
  }

  // Key blocks [0, visible) that any query of a span or of query block m can see.
  PROXYATTN_HOST_DEVICE int64_t visible(const QuerySpan& span) const {
    if (!causal) return num_kv_blocks();
    return ceil_div(clamp(span.last + 1, 0, tokens(kv_len)), kv_block);
  }
  PROXYATTN_HOST_DEVICE int64_t visible(int64_t m) const { return visible(queries(m)); }

 private:
  // More tokens than there can be, few enough for a sum of some. So many blocks hold as many.
  static constexpr int64_t kManyTokens = int64_t{1} << 60;
  static constexpr int64_t kManyBlocks = int64_t{1} << 50;

  static PROXYATTN_HOST_DEVICE int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return min_of(max_of(value, low), high);
  }
  static PROXYATTN_HOST_DEVICE int64_t tokens(int64_t length) {
    return clamp(length, 0, kManyTokens);
  }
  PROXYATTN_HOST_DEVICE int64_t offset() const {
    return clamp(q_offset, -kManyTokens, kManyTokens);
  }
};

// The forced blocks of one query block, or of a span of queries that is treated as one: the local
// ones [local_begin, visible), latest first, then the sink blocks [0, num_sinks), earliest first.
struct ForcedBlocks {
  int64_t visible;
  int64_t local_begin;
  int64_t num_sinks;

  PROXYATTN_HOST_DEVICE ForcedBlocks(const BlockGrid& grid,
                                     int64_t m,
                                     int64_t num_sink_blocks,
                                     int64_t num_local_blocks)
      : ForcedBlocks(grid, grid.queries(m), num_sink_blocks, num_local_blocks) {}
  PROXYATTN_HOST_DEVICE ForcedBlocks(const BlockGrid& grid,
                                     const QuerySpan& span,
                                     int64_t num_sink_blocks,
                                     int64_t num_local_blocks)
      : visible(grid.visible(span)), local_begin(visible), num_sinks(0) {
    if (grid.causal && num_local_blocks > 0) {
      const int64_t own = max_of<int64_t>(0, span.first) / grid.kv_block;
      local_begin = min_of(visible, own - min_of(own, num_local_blocks - 1));
    }
    num_sinks = min_of(max_of<int64_t>(0, num_sink_blocks), local_begin);
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
