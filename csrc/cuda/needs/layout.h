// What lies in the workspace of estimate_needs: the kernels that fill it and those that read it
// agree on this.
#pragma once

#include <cstdint>

#include "proxyattn/needs.h"

#include "common/math.h"

namespace proxyattn::cuda {

// Key blocks that one thread block of the counting kernels works on.
inline constexpr int64_t kBlocksPerPart = 64;

struct NeedLayout {
  int64_t heads;  // batch * q_heads
  int64_t num_kv_blocks;
  int64_t num_parts;  // of the key blocks
  int64_t rows;       // queries that are looked at
  int64_t q_block;    // rows that the arrays below have room for
  float* block_lse;   // [heads, kv_blocks, q_block], base 2: log-sum over the block's keys
  float* part_lse;    // [heads, parts, q_block], base 2: log-sum over the part's blocks
  float* mass;        // [heads, kv_blocks]: sum over rows of the block's share

  explicit NeedLayout(const NeedParams& p)
      : heads(p.batch * p.q_heads),
        num_kv_blocks(ceil_div(p.kv_len, p.kv_block)),
        num_parts(ceil_div(num_kv_blocks, kBlocksPerPart)),
        rows(min_of(p.q_block, p.q_len)),
        q_block(p.q_block),
        block_lse(static_cast<float*>(p.workspace)),
        part_lse(block_lse + heads * num_kv_blocks * q_block),
        mass(part_lse + heads * num_parts * q_block) {}

  int64_t bytes() const {
    return heads * (num_kv_blocks * (q_block + 1) + num_parts * q_block) * int64_t{sizeof(float)};
  }
};

}  // namespace proxyattn::cuda
