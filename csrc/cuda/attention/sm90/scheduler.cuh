// Which query tile a number stands for.
//
// Tiles are handed out through one counter. Key/value heads are taken in sections whose keys and
// values fit the L2 cache together; in a section come the query blocks from the last (the longest
// when causal) down, so that the tiles that teams end with are short; of a query block the
// key/value heads, and of one of those the query heads that share it, side by side.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/problem.h"
#include "cuda/common/macros.cuh"

namespace proxyattn::cuda::sm90 {

struct TilePlace {
  int row;  // query block, counted from the first of the sequence
  int batch;
  int kv_head;
  int head;  // query head, or the first of the group that the pair is of
  int pair;

  PROXYATTN_DEVICE TilePlace(const Problem& p, int tile) {
    const int tiles_per_kv = p.num_rows * p.tiles_per_kv_row;
    const int first_kv = tile / (p.section_kv * tiles_per_kv) * p.section_kv;
    const int in_section = tile - first_kv * tiles_per_kv;
    const int tiles_per_row = min(p.section_kv, p.num_kv - first_kv) * p.tiles_per_kv_row;
    const int in_row = in_section % tiles_per_row;
    row = p.row_begin + p.num_rows - 1 - in_section / tiles_per_row;
    const int kv = first_kv + in_row / p.tiles_per_kv_row;
    const int place = in_row % p.tiles_per_kv_row;
    batch = kv / p.kv_heads;
    kv_head = kv - batch * p.kv_heads;
    pair = place % p.group_pairs;
    head = kv_head * p.heads_per_kv + place / p.group_pairs * p.pair_group;
  }

  // The counts of the query block, num_rows apart from head to head.
  PROXYATTN_DEVICE const int32_t* counts(const Problem& p) const {
    return p.counts + (static_cast<int64_t>(batch) * p.q_heads + head) * p.num_rows + row -
           p.row_begin;
  }

  // The list of the query block.
  PROXYATTN_DEVICE const int32_t* list(const Problem& p) const {
    const int64_t list_head = static_cast<int64_t>(batch) * p.list_heads + head / p.heads_per_list;
    return p.indices + (list_head * p.num_rows + row - p.row_begin) * p.list_capacity;
  }

  // Key blocks that any row of the query block sees.
  PROXYATTN_DEVICE int visible_blocks(const Problem& p, int block_rows) const {
    if (!p.causal) return p.num_kv_blocks;
    const int last_position = p.q_offset + min((row + 1) * block_rows, p.q_len) - 1;
    return min(last_position / p.kv_block + 1, p.num_kv_blocks);
  }
};

}  // namespace proxyattn::cuda::sm90
