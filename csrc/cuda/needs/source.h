// Whose queries estimate_needs looks at, and which keys they meet.
#pragma once

#include <cstdint>

#include "proxyattn/needs.h"

#include "common/math.h"
#include "common/sequence.h"
#include "common/visibility.h"

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

  // The same of each entry of a batch.
  static NeedSource of_entry(const NeedParams& p) {
    const int64_t rows = min_of(p.q_block, p.q_len);
    const int64_t first_query = p.q_len - rows;
    return {first_query,
            0,
            p.q_offset + first_query,
            static_cast<int>(rows),
            static_cast<int>(p.kv_len),
            0,
            0,
            0,
            p.causal};
  }

  static PROXYATTN_HOST_DEVICE NeedSource of(const Sequence& s,
                                             int q_block,
                                             int first_chunk,
                                             bool causal) {
    const int rows = min_of(q_block, s.q_len);
    const int first_query = s.q_len - rows;
    return {int64_t{s.q_start} + first_query,
            s.kv_start,
            int64_t{s.offset} + first_query,
            rows,
            rows == 0 ? 0 : s.kv_len,
            s.first_kv_block,
            first_chunk,
            s.idx,
            causal};
  }

  // Keys [0, visible) that a row sees; none for one that does not exist.
  PROXYATTN_HOST_DEVICE int visible_keys(int row) const {
    if (row >= rows) return 0;
    if (!causal) return num_keys;
    return static_cast<int>(max_of<int64_t>(0, min_of<int64_t>(position + row + 1, num_keys)));
  }

  // Key blocks [0, hidden) that a window hides from all rows.
  PROXYATTN_HOST_DEVICE int hidden_blocks(const Visibility<int64_t>& visibility,
                                          int kv_block) const {
    return visibility.rows(position, num_keys).narrow().blocks(rows - 1, kv_block).first;
  }
};

}  // namespace proxyattn::cuda
