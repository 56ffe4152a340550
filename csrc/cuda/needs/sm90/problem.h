// What the sm90 kernel of estimate_needs is told, and how its work is cut into items.
//
// The rows of a kv head are the last q_block queries of each of its query heads, one head after the
// other, in units of 64: the rows of a warpgroup. An item is a row tile times a chunk of keys; the
// row tiles of a kv head are neighbours, so that they read its keys together.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "common/math.h"
#include "cuda/sm90/key_maps.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {

struct NeedProblem {
  CUtensorMap q_map;  // [batch, q_heads, head_dim / 64, q_len, 64], 64 rows
  KeyMaps keys;       // [batch, kv_heads, kv_len, head_dim]

  float* block_lse;  // [batch * q_heads, kv_blocks, q_block]

  int kv_heads;
  int group_heads;  // query heads of a kv head
  int group_tiles;  // row tiles of a kv head
  int head_units;   // units of a query head: 1 or 2
  int first_query;  // the first of the queries that are looked at
  int position;     // of that query
  int num_keys;
  int num_key_tiles;
  int num_kv_blocks;
  int chunk_tiles;  // key tiles of a chunk
  int num_chunks;
  int num_items;
  int causal;    // 0 or 1
  float factor;  // scale * log2(e)
};

struct NeedItem {
  int batch;
  int kv_head;
  int row_tile;
  int first_tile;
  int num_tiles;

  static PROXYATTN_HOST_DEVICE NeedItem make(const NeedProblem& p, int item) {
    NeedItem i;
    i.row_tile = item % p.group_tiles;
    item /= p.group_tiles;
    const int chunk = item % p.num_chunks;
    item /= p.num_chunks;
    i.kv_head = item % p.kv_heads;
    i.batch = item / p.kv_heads;
    i.first_tile = chunk * p.chunk_tiles;
    i.num_tiles = min_of(p.chunk_tiles, p.num_key_tiles - i.first_tile);
    return i;
  }
};

// A warpgroup's 64 rows.
struct NeedRows {
  int head;  // of the kv head's query heads
  int row;   // first of its rows, counted from the head's first

  PROXYATTN_HOST_DEVICE NeedRows(const NeedProblem& p, int unit)
      : head(unit / p.head_units), row(unit % p.head_units * kGroupRows) {}
};

}  // namespace proxyattn::cuda::sm90
