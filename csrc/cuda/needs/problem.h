// What the portable kernel of block_lse is told, and how its work is cut into chunks of keys.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "common/math.h"
#include "common/visibility.h"
#include "cuda/needs/source.h"
#include "cuda/sequences/block_runs.h"
#include "cuda/sequences/page_table.h"

namespace proxyattn::cuda {

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
  Visibility<int64_t> visibility;

  PROXYATTN_HOST_DEVICE int64_t q_heads() const { return kv_heads * group_heads; }

  // Of the sequence whose chunk it is.
  PROXYATTN_HOST_DEVICE NeedSource source(int chunk) const {
    if (packed_chunks.table.count == 0) return entry;
    const Sequence& s = packed_chunks.owner(chunk);
    return NeedSource::of(s, q_block, packed_chunks.first_run(s), entry.causal);
  }
};

}  // namespace proxyattn::cuda
