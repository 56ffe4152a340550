// How the copy engine sees the tensors of a call.
#pragma once

#include <cstdint>

#include "proxyattn/attention.h"

#include "cuda/common/tensor_map.h"

namespace proxyattn::cuda::sm90 {

inline bool is_packed(const AttentionParams& a) {
  return a.packed.q_starts != nullptr;
}

// Packed queries are one batch entry.
inline TensorSizes query_sizes(const AttentionParams& a) {
  if (is_packed(a)) return {a.packed.total_q, a.head_dim, a.q_heads, 1};
  return {a.q_len, a.head_dim, a.q_heads, a.batch};
}

// Packed keys are one batch entry, pages an entry each.
inline TensorSizes key_sizes(const AttentionParams& a) {
  const PackedSequences& packed = a.packed;
  if (packed.page_table != nullptr) {
    return {packed.page_len, a.head_dim, a.kv_heads, packed.num_pages};
  }
  if (is_packed(a)) return {packed.total_kv, a.head_dim, a.kv_heads, 1};
  return {a.kv_len, a.head_dim, a.kv_heads, a.batch};
}

}  // namespace proxyattn::cuda::sm90
