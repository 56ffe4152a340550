// Packed sequences: of different lengths, one behind another, their keys perhaps in pages.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

namespace proxyattn {

// In a params struct with packed sequences `batch` counts them, q_len and kv_len are the most that
// one may have, and tensors of queries have no batch dimension. Lengths, starts and pages lie where
// the tensors do; on a GPU they are read when the call runs. What they say is cut to what the
// tensors and the capacities hold.
struct PackedSequences {
  const int32_t* q_starts = nullptr;   // [batch + 1], tokens of q; null: a batch of equal sequences
  const int32_t* kv_starts = nullptr;  // [batch + 1], tokens of k and v; null with pages
  const int32_t* kv_lens = nullptr;    // [batch]; null: as far as the next one starts
  const int32_t* page_table = nullptr;  // [batch, table_pages]; null: keys follow one another
  int64_t total_q = 0;                  // tokens of q
  int64_t total_kv = 0;                 // tokens of k and v, without pages
  int64_t table_pages = 0;
  int64_t num_pages = 0;     // of the cache [num_pages, page_len, kv_heads, head_dim]
  int64_t page_len = 0;      // tokens; k and v strides count pages as batch entries
  int64_t max_total_kv = 0;  // keys of all sequences together, at most; 0: nobody knows
  // Query blocks of all sequences to work on; none: all.
  BlockRange blocks = {0, 0};
  const void* table = nullptr;  // what prepare_sequences made of these, if it did already
  int64_t table_stride = 1;     // SequenceParams::stride of then
};

// The query blocks that are worked on are at most so many: those of all sequences, one sequence
// after another, or a range of them. To what works on a range, a sequence is what the range has of
// it.
inline int64_t max_packed_blocks(const PackedSequences& packed, int64_t count, int64_t q_block) {
  const int64_t range = packed.blocks.end - packed.blocks.begin;
  return range > 0 ? range : packed.total_q / q_block + count;
}

struct SequenceParams {
  int64_t count;
  int64_t max_q_len;
  int64_t max_kv_len;
  int64_t q_block;
  int64_t kv_block;
  int64_t stride;  // tokens of a window of the proxies
  PackedSequences packed;
  void* table;  // sequence_table_bytes(params)
};

int64_t sequence_table_bytes(const SequenceParams& params);

namespace cuda {
void prepare_sequences(const SequenceParams& params, Stream stream);
}

}  // namespace proxyattn
