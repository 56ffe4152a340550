// How the copy engine sees the tensors of a call.
#pragma once

#include <cstdint>

#include "proxyattn/attention.h"

#include "cuda/attention/sm90/tile_order.h"
#include "cuda/common/tensor_map.h"

namespace proxyattn::cuda::sm90 {

inline TensorSizes query_sizes(const AttentionParams& a) {
  return {is_packed(a) ? a.packed.total_q : a.q_len, a.head_dim, a.q_heads, batch_entries(a)};
}

// Pages are an entry each.
inline TensorSizes key_sizes(const AttentionParams& a) {
  const PackedSequences& packed = a.packed;
  if (packed.page_table != nullptr) {
    return {packed.page_len, a.head_dim, a.kv_heads, packed.num_pages};
  }
  return {is_packed(a) ? packed.total_kv : a.kv_len, a.head_dim, a.kv_heads, batch_entries(a)};
}

}  // namespace proxyattn::cuda::sm90
