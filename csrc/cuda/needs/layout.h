// What lies in the workspace of estimate_needs: the kernels that fill it and those that read it
// agree on this.
#pragma once

#include <cstdint>

#include "proxyattn/needs.h"

#include "common/math.h"
#include "common/sequence.h"
#include "common/visibility.h"
#include "cuda/needs/source.h"
#include "cuda/sequences/block_runs.h"
#include "cuda/sequences/packed.h"

namespace proxyattn::cuda {

// Key blocks that one thread block of the counting kernels works on.
inline constexpr int64_t kBlocksPerPart = 64;

// What is known of a batch entry or of a packed sequence. Its key blocks and parts stand among
// those of its heads. One without queries or without keys has none.
struct NeedSpan {
  int rows;  // queries that are looked at
  int first_block;
  int num_blocks;
  int first_part;
  int num_parts;
  int hidden_blocks;  // from the first on, by a window: in block_lse nothing is known of them
};

// The masses of one sequence's key blocks for one head.
struct HeadMass {
  const float* blocks;
  int num_blocks;
};

// In a batch each entry's heads have rows of their own below. Packed sequences share them: a head's
// key blocks are those of one sequence after another, so that memory follows what all sequences
// have together.
struct NeedLayout {
  int64_t heads;          // batch * q_heads; of packed sequences: q_heads
  int64_t num_kv_blocks;  // of a head; of packed sequences at most so many
  int64_t num_parts;      // of these key blocks
  int64_t rows;           // queries that are looked at, of a batch entry
  int64_t q_block;        // rows that the arrays below have room for
  float* block_lse;       // [heads, kv_blocks, q_block], base 2: log-sum over the block's keys
  float* part_lse;        // [heads, parts, q_block], base 2: log-sum over the part's blocks
  float* mass;            // [heads, kv_blocks]: sum over rows of the block's share
  NeedSpan entry;         // of a batch entry
  KeyRuns packed_parts;   // of no sequences: a batch
  int64_t q_heads;
  int64_t kv_block;
  bool causal;
  Visibility<int64_t> visibility;

  explicit NeedLayout(const NeedParams& p)
      : heads(is_packed(p) ? p.q_heads : p.batch * p.q_heads),
        num_kv_blocks(is_packed(p)
                          ? max_total_keys(p.packed, p.batch, p.kv_len) / p.kv_block + p.batch
                          : ceil_div(p.kv_len, p.kv_block)),
        num_parts(is_packed(p) ? KeyRuns::capacity(num_kv_blocks, kBlocksPerPart, p.batch)
                               : ceil_div(num_kv_blocks, kBlocksPerPart)),
        rows(min_of(p.q_block, p.q_len)),
        q_block(p.q_block),
        block_lse(static_cast<float*>(p.workspace)),
        part_lse(block_lse + heads * num_kv_blocks * q_block),
        mass(part_lse + heads * num_parts * q_block),
        entry{static_cast<int>(rows),
              0,
              static_cast<int>(num_kv_blocks),
              0,
              static_cast<int>(num_parts),
              NeedSource::of_entry(p).hidden_blocks(Visibility<int64_t>(p.causal, p.window),
                                                    static_cast<int>(p.kv_block))},
        packed_parts{packed_table(p), static_cast<int32_t>(kBlocksPerPart)},
        q_heads(p.q_heads),
        kv_block(p.kv_block),
        causal(p.causal),
        visibility(p.causal, p.window) {}

  int64_t bytes() const {
    return heads * (num_kv_blocks * (q_block + 1) + num_parts * q_block) * int64_t{sizeof(float)};
  }

  PROXYATTN_HOST_DEVICE NeedSpan span_of(const Sequence& s) const {
    const int block_keys = static_cast<int>(kv_block);
    const NeedSource source = NeedSource::of(s, static_cast<int>(q_block), 0, causal);
    const int blocks = ceil_div(source.num_keys, block_keys);
    return {source.rows,
            source.first_block,
            blocks,
            packed_parts.first_run(s),
            ceil_div(blocks, static_cast<int>(kBlocksPerPart)),
            source.hidden_blocks(visibility, block_keys)};
  }

  // Whose the part is.
  PROXYATTN_HOST_DEVICE NeedSpan span_of_part(int64_t part) const {
    return is_batch() ? entry : span_of(packed_parts.owner(static_cast<int32_t>(part)));
  }

  // Of budgets and shares, [sequences, q_heads].
  PROXYATTN_HOST_DEVICE HeadMass head_mass(int64_t need) const {
    if (is_batch()) return {mass + need * num_kv_blocks, entry.num_blocks};
    const int64_t sequence = need / q_heads;
    const Sequence& s = packed_parts.table.sequences[sequence];
    const int64_t head = need - sequence * q_heads;
    return {mass + head * num_kv_blocks + s.first_kv_block, span_of(s).num_blocks};
  }

  PROXYATTN_HOST_DEVICE bool is_batch() const { return packed_parts.table.count == 0; }
};

}  // namespace proxyattn::cuda
