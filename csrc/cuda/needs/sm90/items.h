// How the work of the sm90 kernel of estimate_needs is cut into items.
//
// The rows of a kv head are the last q_block queries of each of its query heads, one head after the
// other, in units of 64: the rows of a warpgroup. An item is a row tile times a chunk of keys; the
// row tiles of a kv head are neighbours, so that they read its keys together.
//
// A chunk is one stretch of keys or several, counted from key 0. How many is a matter of how much
// work there is to share out. Of packed sequences only the device knows that: the chunks of all
// are numbered there as runs of key blocks, and some numbers may be no chunk's.
#pragma once

#include <cstdint>

#include "proxyattn/needs.h"

#include "common/math.h"
#include "common/sequence.h"
#include "cuda/needs/source.h"
#include "cuda/sequences/block_runs.h"
#include "cuda/sequences/packed.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {

struct NeedItem {
  int num_tiles;  // key tiles to compute; 0: there is nothing to do
  int first_tile;
  int num_whole;    // key tiles of the sequence, or batch entry, that are loaded whole
  int num_keys;     // of the sequence
  int position;     // of row 0
  int first_head;   // of the kv head's query heads, in block_lse
  int first_block;  // of the sequence, in block_lse
  int row_tile;
  // Not for consumers:
  int batch;  // entry of the tensors
  int kv_head;
  int first_query;  // token of row 0
  int first_key;    // token of key 0; 0 with pages
  int sequence;     // row of the page table
};

struct NeedItems {
  NeedSource entry;      // of a batch entry
  SequenceTable packed;  // of no sequences: a batch
  int kv_heads;
  int group_heads;    // query heads of a kv head
  int head_units;     // units of a query head: 1 or 2
  int group_tiles;    // row tiles of a kv head
  int tile_blocks;    // key blocks of a key tile: 1 or 2
  int wanted_chunks;  // of all keys of a head
  int chunk_tiles;    // key tiles of a chunk, of a batch
  int num_chunks;     // of a batch entry
  int num_entries;    // of a batch
  bool in_pages;

  PROXYATTN_HOST_DEVICE bool is_packed() const { return packed.count > 0; }
  PROXYATTN_HOST_DEVICE int q_block() const { return head_units * kGroupRows; }
  // Row tiles of all heads: items of a chunk.
  PROXYATTN_HOST_DEVICE int row_tiles() const { return kv_heads * group_tiles; }

  // Of whole stretches: as many as make about the chunks that are wanted of so many key tiles.
  PROXYATTN_HOST_DEVICE int choose_chunk_tiles(int tiles) const {
    return round_up(max_of(1, ceil_div(tiles, wanted_chunks)), kStretchTiles);
  }

  PROXYATTN_HOST_DEVICE int num_entry_items() const {
    return num_entries * num_chunks * row_tiles();
  }

  PROXYATTN_HOST_DEVICE NeedItem entry_item(int idx) const {
    const int row_tile = idx % group_tiles;
    idx /= group_tiles;
    const int chunk = idx % num_chunks;
    idx /= num_chunks;
    const int batch = idx / kv_heads;
    return make(entry, batch, idx - batch * kv_heads, row_tile, chunk * chunk_tiles, chunk_tiles);
  }

  // Of packed sequences.
  PROXYATTN_HOST_DEVICE int packed_chunk_tiles() const {
    return choose_chunk_tiles(ceil_div(end_block(last()), tile_blocks));
  }

  PROXYATTN_HOST_DEVICE KeyRuns packed_chunks(int tiles_of_chunk) const {
    return {packed, tiles_of_chunk * tile_blocks};
  }

  PROXYATTN_HOST_DEVICE int num_packed_items(const KeyRuns& chunks) const {
    const int own = ceil_div(end_block(last()) - last().first_kv_block, chunks.run_blocks);
    return (chunks.first_run(last()) + own) * row_tiles();
  }

  PROXYATTN_HOST_DEVICE int chunk_of_packed_item(int idx) const { return idx / row_tiles(); }

  // Of the sequence that owns the item's chunk.
  PROXYATTN_HOST_DEVICE NeedItem packed_item(const KeyRuns& chunks,
                                             const Sequence& sequence,
                                             int idx) const {
    const int row_tile = idx % group_tiles;
    idx /= group_tiles;
    const int chunk = idx / kv_heads;
    const NeedSource source =
        NeedSource::of(sequence, q_block(), chunks.first_run(sequence), entry.causal);
    const int tiles = chunks.run_blocks / tile_blocks;
    return make(source, 0, idx - chunk * kv_heads, row_tile, (chunk - source.first_chunk) * tiles,
                tiles);
  }

 private:
  PROXYATTN_HOST_DEVICE const Sequence& last() const { return packed.sequences[packed.count - 1]; }

  PROXYATTN_HOST_DEVICE int end_block(const Sequence& s) const {
    return s.first_kv_block + ceil_div(s.kv_len, kLogitKeys / tile_blocks);
  }

  PROXYATTN_HOST_DEVICE NeedItem make(const NeedSource& source,
                                      int batch,
                                      int kv_head,
                                      int row_tile,
                                      int first_tile,
                                      int max_tiles) const {
    NeedItem i;
    const int end_tile = ceil_div(source.num_keys, kLogitKeys);
    i.num_tiles = max_of(0, min_of(max_tiles, end_tile - first_tile));
    i.first_tile = first_tile;
    i.num_whole = in_pages ? 0 : source.num_keys / kLogitKeys;
    i.num_keys = source.num_keys;
    i.position = static_cast<int>(source.position);
    i.first_head = (batch * kv_heads + kv_head) * group_heads;
    i.first_block = source.first_block;
    i.row_tile = row_tile;
    i.batch = batch;
    i.kv_head = kv_head;
    i.first_query = static_cast<int>(source.first_query);
    i.first_key = static_cast<int>(source.first_key);
    i.sequence = source.sequence;
    return i;
  }
};

// As many chunks are wanted as give every multiprocessor this many items.
inline constexpr int kItemsPerMultiprocessor = 8;

// `groups` are the warpgroups of a thread block.
inline NeedItems make_need_items(const NeedParams& p, int groups, int multiprocessors) {
  NeedItems s{};
  s.entry = NeedSource::of_entry(p);
  s.packed = packed_table(p);
  s.kv_heads = static_cast<int>(p.kv_heads);
  s.group_heads = static_cast<int>(p.q_heads / p.kv_heads);
  s.head_units = static_cast<int>(p.q_block) / kGroupRows;
  s.group_tiles = ceil_div(s.group_heads * s.head_units, groups);
  s.tile_blocks = kLogitKeys / static_cast<int>(p.kv_block);
  s.num_entries = s.is_packed() ? 1 : static_cast<int>(p.batch);
  s.wanted_chunks =
      max_of(1, multiprocessors * kItemsPerMultiprocessor / (s.num_entries * s.row_tiles()));
  const int tiles = ceil_div(s.entry.num_keys, kLogitKeys);
  s.chunk_tiles = s.choose_chunk_tiles(tiles);
  s.num_chunks = ceil_div(tiles, s.chunk_tiles);
  s.in_pages = p.packed.page_table != nullptr;
  return s;
}

// A warpgroup's 64 rows.
struct NeedRows {
  int head;  // of the kv head's query heads
  int row;   // first of its rows, counted from the head's first

  PROXYATTN_HOST_DEVICE NeedRows(const NeedItems& items, int unit)
      : head(unit / items.head_units), row(unit % items.head_units * kGroupRows) {}
};

}  // namespace proxyattn::cuda::sm90
