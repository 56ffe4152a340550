// The geometry of query and key blocks: which key blocks a query block can see, which of them are
// forced and in what order. Host and device code share this one statement of the rules.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/visibility.h"

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
  int64_t window = 0;  // as Visibility takes it

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

  // Key blocks [first_visible, visible) are those that hold a key which any query of a span, or of
  // query block m, sees.
  PROXYATTN_HOST_DEVICE int64_t first_visible(const QuerySpan& span) const {
    return visible_blocks(span).first;
  }
  PROXYATTN_HOST_DEVICE int64_t visible(const QuerySpan& span) const {
    return visible_blocks(span).end;
  }
  PROXYATTN_HOST_DEVICE int64_t first_visible(int64_t m) const { return first_visible(queries(m)); }
  PROXYATTN_HOST_DEVICE int64_t visible(int64_t m) const { return visible(queries(m)); }
  PROXYATTN_HOST_DEVICE int64_t num_visible(int64_t m) const {
    return visible(m) - first_visible(m);
  }
  // No query block has more of them.
  PROXYATTN_HOST_DEVICE int64_t most_visible() const {
    if (!causal || window <= 0) return num_kv_blocks();
    const int64_t keys = min_of(window, tokens(kv_len)) + q_block - 1;  // side by side
    return min_of(num_kv_blocks(), ceil_div(keys - 1, kv_block) + 1);
  }

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
  PROXYATTN_HOST_DEVICE KeyBlocks<int64_t> visible_blocks(const QuerySpan& span) const {
    const auto seen = Visibility<int64_t>(causal, window).rows(span.first, tokens(kv_len));
    return seen.blocks(max_of<int64_t>(0, span.last - span.first), kv_block);
  }
};

// The forced blocks of one query block, or of a span of queries that is treated as one: the local
// ones [local_begin, visible), latest first, then the visible ones among the sink blocks, that is
// [first, first + num_sinks), earliest first.
struct ForcedBlocks {
  int64_t first;    // visible block
  int64_t visible;  // end of the visible blocks
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
      : first(grid.first_visible(span)),
        visible(grid.visible(span)),
        local_begin(visible),
        num_sinks(0) {
    if (grid.causal && num_local_blocks > 0) {
      const int64_t own = max_of<int64_t>(0, span.first) / grid.kv_block;
      local_begin = min_of(visible, max_of(first, own - min_of(own, num_local_blocks - 1)));
    }
    const int64_t sinks_end = min_of(max_of<int64_t>(0, num_sink_blocks), local_begin);
    num_sinks = max_of<int64_t>(0, sinks_end - first);
  }

  PROXYATTN_HOST_DEVICE int64_t count() const { return visible - local_begin + num_sinks; }
  PROXYATTN_HOST_DEVICE int64_t num_visible() const { return visible - first; }

  // Place of visible block n in the ranking if it is forced, else -1.
  PROXYATTN_HOST_DEVICE int64_t rank_of(int64_t n) const {
    if (n >= local_begin) return visible - 1 - n;
    if (n < first + num_sinks) return visible - local_begin + n - first;
    return -1;
  }

  // Block at place `rank` of the ranking, rank < count().
  PROXYATTN_HOST_DEVICE int64_t block_at(int64_t rank) const {
    const int64_t num_local = visible - local_begin;
    return rank < num_local ? visible - 1 - rank : first + rank - num_local;
  }
};

}  // namespace proxyattn
