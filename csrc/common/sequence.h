// What is known of each packed sequence, and the table that holds it: written once a call, by the
// host or by one kernel, and read by every stage.
//
// Things of all sequences are numbered one sequence after another, in the order of the call: query
// blocks, so that lists, scores and query proxies of a block lie together; key blocks; and windows
// of keys, of which each sequence has a multiple of kWindowUnit, so that no tile of key proxies
// belongs to two of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proxyattn/sequences.h"

#include "common/math.h"

namespace proxyattn {

inline constexpr int64_t kWindowUnit = 128;

struct alignas(16) Sequence {
  int32_t q_start;  // token of q, and of out
  int32_t q_len;
  int32_t kv_start;  // token of packed k and v; 0 with pages
  int32_t kv_len;
  int32_t offset;         // position of query 0; negative where queries outnumber keys
  int32_t first_q_block;  // among those of all sequences
  int32_t first_kv_block;
  int32_t first_key_unit;  // of kWindowUnit windows of keys
  int32_t idx;             // in the order of the call: the row of the page table
  int32_t unused[3];
};

// Entries behind the last sequence's blocks and units name no sequence: `count`.
struct SequenceTable {
  Sequence* sequences;      // [count], in the order of the call
  int32_t* order;           // [count], from the one with the most keys to that with the fewest
  int32_t* blocks_before;   // [count + 1], query blocks of those before in that order
  int32_t* block_sequence;  // [max_q_blocks], whose query block it is
  int32_t* unit_sequence;   // [max_key_units], whose windows of keys
  int32_t count;
  int32_t max_q_blocks;
  int32_t max_key_units;

  SequenceTable() = default;
  SequenceTable(const void* memory, const SequenceParams& p)
      : count(static_cast<int32_t>(p.count)),
        max_q_blocks(static_cast<int32_t>(max_packed_blocks(p.packed, p.count, p.q_block))),
        max_key_units(static_cast<int32_t>(max_units(p))) {
    auto* at = static_cast<std::byte*>(const_cast<void*>(memory));
    sequences = reinterpret_cast<Sequence*>(at);
    order = reinterpret_cast<int32_t*>(at + p.count * int64_t{sizeof(Sequence)});
    blocks_before = order + count;
    block_sequence = blocks_before + count + 1;
    unit_sequence = block_sequence + max_q_blocks;
  }

  static int64_t bytes(const SequenceParams& p) {
    const int64_t words =
        2 * p.count + 1 + max_packed_blocks(p.packed, p.count, p.q_block) + max_units(p);
    return p.count * int64_t{sizeof(Sequence)} + words * int64_t{sizeof(int32_t)};
  }

  static int64_t max_units(const SequenceParams& p) {
    return p.packed.max_total_kv / (p.stride * kWindowUnit) + p.count;
  }
};

// Of any stage's params. `stride` is that of the proxies which the table says where to find.
template <typename Params>
SequenceParams sequence_params(const Params& p, int64_t stride) {
  SequenceParams s{};
  s.count = p.batch;
  s.max_q_len = p.q_len;
  s.max_kv_len = p.kv_len;
  s.q_block = p.q_block;
  s.kv_block = p.kv_block;
  s.stride = stride;
  s.packed = p.packed;
  return s;
}

}  // namespace proxyattn
