// Packed sequences on the CPU: each is worked on as the dense call that it equals, through views of
// the packed tensors. Keys that lie in pages are gathered into the front of the workspace first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/math.h"
#include "common/sequence.h"
#include "common/tokens.h"

namespace proxyattn::cpu {

inline constexpr int64_t kGatherAlignment = 64;

template <typename Params>
SequenceLimits limits_of(const Params& p) {
  return sequence_limits(p.packed, p.q_len, p.kv_len);
}

// What the keys of the longest sequence take when they are gathered, and its values as much again.
template <typename Params>
int64_t gathered_bytes(const Params& p) {
  if (p.packed.page_table == nullptr) return 0;
  const int64_t row_bytes = p.kv_heads * p.head_dim * element_bytes(p.dtype);
  return round_up(limits_of(p).kv_len * row_bytes, kGatherAlignment);
}

// A dense call that needs as much as that of any sequence.
template <typename Params>
Params longest_sequence(const Params& p) {
  if (p.packed.q_starts == nullptr) return p;
  Params longest = p;
  longest.packed = {};
  longest.batch = 1;
  longest.q_len = limits_of(p).q_len;
  longest.kv_len = limits_of(p).kv_len;
  longest.q_offset = longest.kv_len - longest.q_len;
  return longest;
}

// tokens[kv_len][heads][head_dim] = a sequence's part of [pages, page_len, heads, head_dim].
struct Gather {
  const void* pages;
  TokenStrides strides;
  int64_t heads;
  int64_t head_dim;
  DType dtype;
};
void gather_pages(const PackedSequences& packed,
                  const Sequence& sequence,
                  const Gather& gather,
                  void* tokens);

template <typename Params>
void place_keys(const Params& p, const Sequence& s, Params* view) {
  if (p.packed.page_table == nullptr) {
    view->k = from_token(p.k, p.k_strides, s.kv_start, p.dtype);
    view->v = from_token(p.v, p.v_strides, s.kv_start, p.dtype);
    return;
  }
  auto* const keys = static_cast<std::byte*>(p.workspace);
  auto* const values = keys + gathered_bytes(p);
  gather_pages(p.packed, s, {p.k, p.k_strides, p.kv_heads, p.head_dim, p.dtype}, keys);
  view->k = keys;
  view->k_strides = view->v_strides = {0, p.kv_heads * p.head_dim, p.head_dim};
  if (p.v == nullptr) return;
  gather_pages(p.packed, s, {p.v, p.v_strides, p.kv_heads, p.head_dim, p.dtype}, values);
  view->v = values;
}

// Calls body(params, sequence) for every sequence with queries, with the params of the dense call
// that does its part; for a batch once, with the params that it has and a sequence of zeros.
template <typename Params, typename Body>
void for_each_sequence(const Params& p, const Body& body) {
  if (p.packed.q_starts == nullptr) {
    body(p, Sequence{});
    return;
  }
  SequenceReader reader(p.packed, limits_of(p), p.q_block);
  for (int64_t i = 0; i < p.batch; ++i) {
    const Sequence s = reader.next();
    if (s.q_len == 0) continue;
    Params view = p;
    view.packed = {};
    view.batch = 1;
    view.q_len = s.q_len;
    view.kv_len = s.kv_len;
    view.q_offset = s.offset;
    view.list_rows = {p.list_rows.begin - s.first_q_block, p.list_rows.end - s.first_q_block};
    view.q = from_token(p.q, p.q_strides, s.q_start, p.dtype);
    view.out = from_token(p.out, p.out_strides, s.q_start, p.dtype);
    view.lse = p.lse == nullptr ? nullptr : p.lse + s.q_start;
    place_keys(p, s, &view);
    body(view, s);
  }
}

}  // namespace proxyattn::cpu
