// Which query tile a thread block works on: the order of the grid.
//
// Thread blocks start in the order of their number, so long tiles come early: query tiles run from
// the last to the first. The heads of one key/value head lie side by side and read the same keys.
// Key/value heads are taken in sections whose keys and values fit the L2 cache together.
#pragma once

#include <cstdint>

#include "proxyattn/attention.h"

#include "common/math.h"

namespace proxyattn::cuda {

struct QueryTile {
  int batch_idx;
  int head_idx;
  int q_block_idx;
  int first_query;
  int num_queries;  // 0 or less where the tile lies behind the last query
};

struct TileSchedule {
  uint32_t kv_pairs;          // batch * kv_heads
  uint32_t pairs_in_section;  // the last section may hold fewer
  uint32_t kv_heads;
  uint32_t group_heads;  // query heads per key/value head
  uint32_t num_tiles;    // query tiles per head
  uint32_t tiles_per_block;
  uint32_t tile_rows;
  uint32_t first_q_block;
  uint32_t q_len;

  int64_t num_thread_blocks() const {
    return int64_t{kv_pairs} * int64_t{group_heads} * int64_t{num_tiles};
  }

  PROXYATTN_HOST_DEVICE QueryTile tile(uint32_t thread_block) const {
    const uint32_t per_section = pairs_in_section * group_heads * num_tiles;
    const uint32_t first_pair = thread_block / per_section * pairs_in_section;
    const uint32_t place = thread_block % per_section;
    const uint32_t heads = min_of(pairs_in_section, kv_pairs - first_pair) * group_heads;
    const uint32_t tile_idx = num_tiles - 1 - place / heads;
    const uint32_t pair = first_pair + place % heads / group_heads;
    const uint32_t q_block_idx = first_q_block + tile_idx / tiles_per_block;
    const uint32_t first_query = (first_q_block * tiles_per_block + tile_idx) * tile_rows;
    QueryTile result;
    result.batch_idx = static_cast<int>(pair / kv_heads);
    result.head_idx = static_cast<int>(pair % kv_heads * group_heads + place % group_heads);
    result.q_block_idx = static_cast<int>(q_block_idx);
    result.first_query = static_cast<int>(first_query);
    result.num_queries =
        static_cast<int>(min_of(first_query + tile_rows, q_len)) - static_cast<int>(first_query);
    return result;
  }
};

// Key/value heads, of all batch entries, whose keys and values take up to `section_bytes`; at least
// one.
inline int64_t kv_pairs_in_section(const AttentionParams& p, int64_t section_bytes) {
  constexpr int64_t kElementBytes = 2;
  const int64_t pair_bytes = max_of<int64_t>(1, 2 * p.kv_len * p.head_dim * kElementBytes);
  return min_of(p.batch * p.kv_heads, max_of<int64_t>(1, section_bytes / pair_bytes));
}

// `tile_rows` divides q_block; `section_bytes` of keys and values are read at about the same time.
inline TileSchedule make_schedule(const AttentionParams& p,
                                  int64_t tile_rows,
                                  int64_t section_bytes) {
  const int64_t kv_pairs = p.batch * p.kv_heads;
  const int64_t tiles_per_block = p.q_block / tile_rows;
  const auto narrow = [](int64_t value) { return static_cast<uint32_t>(value); };
  return {narrow(kv_pairs),
          narrow(kv_pairs_in_section(p, section_bytes)),
          narrow(p.kv_heads),
          narrow(p.q_heads / p.kv_heads),
          narrow((p.rows.end - p.rows.begin) * tiles_per_block),
          narrow(tiles_per_block),
          narrow(tile_rows),
          narrow(p.rows.begin),
          narrow(p.q_len)};
}

}  // namespace proxyattn::cuda
