// Which query tile a thread block works on: the order of the grid.
//
// Thread blocks start in the order of their number, so long tiles come early: query tiles run from
// the last to the first. The heads of one key/value head lie side by side and read the same keys.
// Key/value heads are taken in sections whose keys and values fit the L2 cache together.
#pragma once

#include <cstdint>

#include "proxyattn/attention.h"

#include "common/math.h"
#include "common/sequence.h"
#include "cuda/sequences/packed.h"

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

// Packed sequences are taken one after another, from the one with the most keys down, each in the
// order of a schedule of its own.
struct PackedSchedule {
  TileSchedule call;  // of a sequence it lacks pairs_in_section, num_tiles and q_len
  SequenceTable table;
  uint32_t cached_keys;  // of a head, with their values, that a section may have

  // Of a query block.
  PROXYATTN_HOST_DEVICE uint32_t block_tiles() const {
    return call.kv_pairs * call.group_heads * call.tiles_per_block;
  }

  // Those of as many query blocks as there can be.
  int64_t num_thread_blocks() const { return int64_t{block_tiles()} * table.max_q_blocks; }

  // Null behind the last tile. `tile` counts the sequence's own query blocks and queries.
  PROXYATTN_HOST_DEVICE const Sequence* find(uint32_t thread_block, QueryTile& tile) const {
    const auto block = static_cast<int32_t>(thread_block / block_tiles());
    if (block >= table.blocks_before[table.count]) return nullptr;
    int32_t place = 0;  // the last one with no more blocks before it
    for (int32_t end = table.count; end - place > 1;) {
      const int32_t middle = (place + end) / 2;
      (table.blocks_before[middle] <= block ? place : end) = middle;
    }
    const Sequence& sequence = table.sequences[table.order[place]];
    const auto first_block = static_cast<uint32_t>(table.blocks_before[place]);
    const auto blocks = static_cast<uint32_t>(table.blocks_before[place + 1]) - first_block;
    TileSchedule own = call;
    own.num_tiles = blocks * own.tiles_per_block;
    own.q_len = static_cast<uint32_t>(sequence.q_len);
    const auto keys = static_cast<uint32_t>(max_of(sequence.kv_len, 1));
    own.pairs_in_section = max_of(1u, min_of(own.kv_pairs, cached_keys / keys));
    tile = own.tile(thread_block - first_block * block_tiles());
    return &sequence;
  }
};

// Of a key and its value, of one head.
inline int64_t key_bytes(const AttentionParams& p) {
  constexpr int64_t kElementBytes = 2;
  return 2 * p.head_dim * kElementBytes;
}

// Key/value heads, of all batch entries, whose keys and values take up to `section_bytes`; at least
// one.
inline int64_t kv_pairs_in_section(const AttentionParams& p, int64_t section_bytes) {
  const int64_t pair_bytes = max_of<int64_t>(1, p.kv_len * key_bytes(p));
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

inline PackedSchedule make_packed_schedule(const AttentionParams& p,
                                           int64_t tile_rows,
                                           int64_t section_bytes) {
  PackedSchedule schedule;
  AttentionParams one = p;
  one.batch = 1;
  schedule.call = make_schedule(one, tile_rows, section_bytes);
  schedule.table = packed_table(p);
  schedule.cached_keys = static_cast<uint32_t>(section_bytes / key_bytes(p));
  return schedule;
}

}  // namespace proxyattn::cuda
