// What is known of each packed sequence, and the table that holds it: written once a call, by the
// host or by one kernel, and read by every stage.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proxyattn/sequences.h"

#include "common/math.h"

namespace proxyattn {

struct alignas(16) Sequence {
  int32_t q_start;  // token of q, and of out
  int32_t q_len;
  int32_t kv_start;  // token of packed k and v; 0 with pages
  int32_t kv_len;
  int32_t first_q_block;     // among the query blocks of all sequences
  int32_t first_key_window;  // among the key proxies of all sequences: a multiple of kWindowUnit
  int32_t idx;               // in the order of the call: the row of the page table
  int32_t offset;            // position of query 0; negative where queries outnumber keys
};

// Key proxies of a sequence begin at a multiple of this many windows, so that no tile of them
// belongs to two sequences.
inline constexpr int64_t kWindowUnit = 128;

// Sequences, longest first: who takes tiles in this order ends with short ones.
struct SequenceTable {
  Sequence* sequences;      // [count], in the order of the call
  int32_t* order;           // [count], from the one with the most keys to that with the fewest
  int32_t* blocks_before;   // [count + 1], query blocks of those before in that order
  int32_t* block_sequence;  // [max_blocks], whose query block it is; count behind the last
  int32_t count;
  int32_t max_blocks;

  SequenceTable() = default;
  SequenceTable(const void* memory, int64_t num_sequences, int64_t num_blocks)
      : count(static_cast<int32_t>(num_sequences)), max_blocks(static_cast<int32_t>(num_blocks)) {
    auto* at = static_cast<std::byte*>(const_cast<void*>(memory));
    sequences = reinterpret_cast<Sequence*>(at);
    order = reinterpret_cast<int32_t*>(at + num_sequences * int64_t{sizeof(Sequence)});
    blocks_before = order + num_sequences;
    block_sequence = blocks_before + num_sequences + 1;
  }

  static int64_t bytes(int64_t num_sequences, int64_t num_blocks) {
    return num_sequences * int64_t{sizeof(Sequence)} +
           (2 * num_sequences + 1 + num_blocks) * int64_t{sizeof(int32_t)};
  }
};

inline SequenceTable table_of(const PackedSequences& packed, int64_t count, int64_t q_block) {
  return {packed.table, count, max_packed_blocks(packed, count, q_block)};
}

}  // namespace proxyattn
