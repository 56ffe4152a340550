// Iterates the key blocks that one head chose for one query block, in tiles of a few keys.
//
// Nothing is asked of the order of a list, and nothing in it is trusted: a count is clamped to the
// list's capacity, and an entry that names no key block stands for a block without keys.
#pragma once

#include <cstdint>

#include "proxyattn/attention.h"

#include "common/math.h"
#include "common/visibility.h"
#include "cuda/common/macros.cuh"

namespace proxyattn::cuda {

struct BlockList {
  const int32_t* entries;  // null: blocks first + count - 1, ..., first
  int count;
  int first;
};

// Every block with a key that one of rows 0 to last_row sees.
PROXYATTN_DEVICE BlockList visible_blocks(const RowKeys<int>& keys, int last_row, int kv_block) {
  const KeyBlocks<int> blocks = keys.blocks(last_row, kv_block);
  return {nullptr, blocks.end - blocks.first, blocks.first};
}

// The list of query block `q_block_idx`, counted from the first query of the call.
PROXYATTN_DEVICE BlockList chosen_blocks(const AttentionParams& p,
                                         int batch_idx,
                                         int head_idx,
                                         int q_block_idx) {
  const int heads_per_list = static_cast<int>(p.q_heads) / static_cast<int>(p.list_heads);
  const int64_t list_idx = batch_idx * p.list_heads + head_idx / heads_per_list;
  const int64_t num_rows = p.list_rows.end - p.list_rows.begin;
  const int64_t row = q_block_idx - p.list_rows.begin;
  const int32_t count = p.counts[(batch_idx * p.q_heads + head_idx) * num_rows + row];
  const int64_t usable = min_of(max_of<int64_t>(count, 0), p.list_capacity);
  return {p.indices + (list_idx * num_rows + row) * p.list_capacity, static_cast<int>(usable), 0};
}

// Cuts the blocks of a list into tiles of kTileKeys keys and skips the tiles that no query of the
// caller can see. Every thread of a block walks for itself, through the same reads.
template <int kTileKeys>
class KeyTileWalk {
 public:
  static constexpr int kEnd = -1;

  // Keys at or past `key_limit` are not seen. `kv_block` is a power of two.
  PROXYATTN_DEVICE KeyTileWalk(const BlockList& list, int kv_block, int num_blocks, int key_limit)
      : entry_(list.entries),
        remaining_(list.count),
        first_(list.first),
        kv_block_(kv_block),
        num_blocks_(num_blocks),
        key_limit_(max_of(key_limit, 0)) {
    read_ahead();
  }

  // First key of the next tile, or kEnd. Tiles of a block come last keys first, so that a list
  // that begins at the diagonal meets its masked tiles first.
  PROXYATTN_DEVICE int next() {
    while (true) {
      if ((position_ & (kv_block_ - 1)) == 0) {
        if (remaining_ == 0) return kEnd;
        --remaining_;
        enter(upcoming_);
        read_ahead();
      }
      position_ -= kTileKeys;
      if (static_cast<unsigned>(position_) < static_cast<unsigned>(key_limit_)) return position_;
    }
  }

 private:
  // An entry that names no block is walked as the keys before key 0, which nobody sees.
  PROXYATTN_DEVICE void enter(int block) {
    const bool names_block = static_cast<unsigned>(block) < static_cast<unsigned>(num_blocks_);
    position_ = names_block ? (block + 1) * kv_block_ : 0;
  }

  // The entry after the current one is read a whole block before it is looked at, so that nobody
  // waits for it.
  PROXYATTN_DEVICE void read_ahead() {
    if (remaining_ == 0) return;
    upcoming_ = entry_ == nullptr ? first_ + remaining_ - 1 : __ldg(entry_++);
  }

  const int32_t* entry_;  // null: blocks first + remaining - 1, ..., first
  int remaining_;         // blocks after the current one
  int first_;
  int kv_block_;
  int num_blocks_;
  int key_limit_;
  int upcoming_ = -1;  // entry of the block after the current one
  int position_ = 0;   // first key of the current tile; a multiple of kv_block when a block is done
};

}  // namespace proxyattn::cuda
