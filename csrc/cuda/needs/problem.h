// What the portable kernel of block_lse is told, and how its work is cut into chunks of keys.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "common/math.h"
#include "common/sequence.h"
#include "cuda/sequences/block_runs.h"
#include "cuda/sequences/page_table.h"

namespace proxyattn::cuda {

// The last queries of a batch entry or of a packed sequence, and its keys.
struct NeedSource {
  int64_t first_query;  // token of row 0
  int64_t first_key;    // token of key 0; 0 with pages
  int64_t position;     // of row 0
  int rows;
  int num_keys;
  int first_block;  // of its key blocks, in block_lse
  int first_chunk;
  int sequence;  // row of the page table
  bool causal;

  // Keys [0, visible) that a row sees; none for one that does not exist.
  PROXYATTN_HOST_DEVICE int visible_keys(int row) const {
    if (row >= rows) return 0;
    if (!causal) return num_keys;
    return static_cast<int>(max_of<int64_t>(0, min_of<int64_t>(position + row + 1, num_keys)));
  }
};

struct NeedProblem {
  const void* q;
  const void* k;
  float* block_lse;
  TokenStrides q_strides;
  TokenStrides k_strides;
  NeedSource entry;       // of a batch entry
  KeyRuns packed_chunks;  // of no sequences: a batch
  PageTable pages;
  int64_t batch;
  int64_t kv_heads;
  int64_t group_heads;    // query heads of a kv head
  int64_t num_kv_blocks;  // of a head in block_lse
  int q_block;
  int kv_block;
  int chunk_keys;   // a multiple of kv_block
  int num_chunks;   // of packed sequences at most so many
  int group_tiles;  // row tiles of a kv head
  float factor;     // scale * log2(e)
  bool q_aligned;
  bool k_aligned;

  PROXYATTN_HOST_DEVICE int64_t q_heads() const { return kv_heads * group_heads; }

  // Of the sequence whose chunk it is.
  PROXYATTN_HOST_DEVICE NeedSource source(int chunk) const {
    if (packed_chunks.table.count == 0) return entry;
    const Sequence& s = packed_chunks.owner(chunk);
    const int rows = min_of(q_block, s.q_len);
    const int first_query = s.q_len - rows;
    return {int64_t{s.q_start} + first_query,
            s.kv_start,
            int64_t{s.offset} + first_query,
            rows,
            rows == 0 ? 0 : s.kv_len,
            s.first_kv_block,
            packed_chunks.first_run(s),
            s.idx,
            entry.causal};
  }
};

}  // namespace proxyattn::cuda
