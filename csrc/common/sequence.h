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
#include <limits>

#include "proxyattn/sequences.h"

#include "common/math.h"

namespace proxyattn {

inline constexpr int64_t kWindowUnit = 128;

// Keys of all sequences together, at most: what the caller says, or what their tensor or each one's
// capacity holds.
inline int64_t max_total_keys(const PackedSequences& packed, int64_t count, int64_t max_kv_len) {
  constexpr int64_t kMost = int64_t{1} << 30;  // kernels count with 32 bits
  if (packed.max_total_kv > 0) return min_of(packed.max_total_kv, kMost);
  return min_of(packed.page_table == nullptr ? packed.total_kv : count * max_kv_len, kMost);
}

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
    return max_total_keys(p.packed, p.count, p.max_kv_len) / (p.stride * kWindowUnit) + p.count;
  }
};

// What the tensors and the capacities of a call hold, in the numbers of the table.
struct SequenceLimits {
  int32_t total_q;   // tokens
  int32_t total_kv;  // tokens; without pages
  int32_t q_len;     // of one sequence
  int32_t kv_len;    // of one sequence
};

inline SequenceLimits sequence_limits(const PackedSequences& packed,
                                      int64_t max_q_len,
                                      int64_t max_kv_len) {
  const auto cut = [](int64_t tokens) {
    return static_cast<int32_t>(min_of<int64_t>(tokens, std::numeric_limits<int32_t>::max()));
  };
  const int64_t held =
      packed.page_table == nullptr ? packed.total_kv : packed.table_pages * packed.page_len;
  return {cut(packed.total_q), cut(packed.total_kv), cut(min_of(max_q_len, packed.total_q)),
          cut(min_of(max_kv_len, held))};
}

// A start in a tensor of `total` tokens that is no less than the one before it, `least`.
PROXYATTN_HOST_DEVICE int32_t cut_start(int32_t start, int32_t least, int32_t total) {
  return min_of(max_of(start, least), total);
}

// Tokens of a packed tensor, from one start to the next.
struct TokenSpan {
  int32_t begin;
  int32_t end;
};

// Sequence `idx` between the starts that were cut for it; `kv` is not looked at with pages.
// Whatever the numbers say, it lies in the tensors and is no longer than the capacities. Its places
// among the blocks and windows of all sequences follow from those before it.
PROXYATTN_HOST_DEVICE Sequence cut_sequence(const PackedSequences& packed,
                                            const SequenceLimits& limits,
                                            int32_t idx,
                                            const TokenSpan& q,
                                            const TokenSpan& kv) {
  Sequence s{};
  s.q_start = q.begin;
  s.q_len = min_of(q.end - q.begin, limits.q_len);
  s.kv_len = limits.kv_len;
  if (packed.kv_starts != nullptr) {
    s.kv_start = kv.begin;
    s.kv_len = min_of(s.kv_len, kv.end - kv.begin);
  }
  if (packed.kv_lens != nullptr) s.kv_len = min_of(s.kv_len, max_of(packed.kv_lens[idx], 0));
  s.idx = idx;
  s.offset = s.kv_len - s.q_len;
  return s;
}

// What of a sequence lies in a range of the query blocks of all sequences, which are numbered anew,
// from the range's first. Of one outside it are no queries.
PROXYATTN_HOST_DEVICE Sequence cut_to_blocks(Sequence s,
                                             int32_t first_block,
                                             int32_t end_block,
                                             int32_t q_block) {
  const int32_t blocks = ceil_div(s.q_len, q_block);
  const int32_t begin = min_of(max_of(first_block - s.first_q_block, 0), blocks);
  const int32_t end = min_of(max_of(end_block - s.first_q_block, begin), blocks);
  s.q_len = begin == end ? 0 : min_of(end * q_block, s.q_len) - begin * q_block;
  s.q_start += begin * q_block;
  s.offset += begin * q_block;
  s.first_q_block = min_of(max_of(s.first_q_block, first_block), end_block) - first_block;
  return s;
}

// The page with the keys from `page` * page_len on of sequence `idx`, or -1, which reads as zeros,
// where the table names none that there is.
PROXYATTN_HOST_DEVICE int32_t cut_page(const PackedSequences& packed, int64_t idx, int64_t page) {
  const int32_t id = packed.page_table[idx * packed.table_pages + page];
  return 0 <= id && id < packed.num_pages ? id : -1;
}

// Reads the sequences of a call, one after another, where the host can.
class SequenceReader {
 public:
  SequenceReader(const PackedSequences& packed, const SequenceLimits& limits, int64_t q_block)
      : packed_(packed), limits_(limits), q_block_(q_block) {
    q_.end = cut_start(packed.q_starts[0], 0, limits.total_q);
    if (packed.kv_starts != nullptr) kv_.end = cut_start(packed.kv_starts[0], 0, limits.total_kv);
  }

  Sequence next() {
    const int32_t idx = next_++;
    advance(packed_.q_starts, limits_.total_q, &q_);
    if (packed_.kv_starts != nullptr) advance(packed_.kv_starts, limits_.total_kv, &kv_);
    Sequence s = cut_sequence(packed_, limits_, idx, q_, kv_);
    s.first_q_block = static_cast<int32_t>(num_q_blocks_);
    num_q_blocks_ += ceil_div<int64_t>(s.q_len, q_block_);
    return s;
  }

 private:
  // To the span that ends at the next start.
  void advance(const int32_t* starts, int32_t total, TokenSpan* span) const {
    span->begin = span->end;
    span->end = cut_start(starts[next_], span->begin, total);
  }

  const PackedSequences& packed_;
  const SequenceLimits limits_;
  const int64_t q_block_;
  TokenSpan q_{};
  TokenSpan kv_{};
  int32_t next_ = 0;
  int64_t num_q_blocks_ = 0;
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
