// How the copy engine sees the tensors of any stage's params.
#pragma once

#include <cstdint>

#include "cuda/common/tensor_map.h"
#include "cuda/sequences/packed.h"

namespace proxyattn::cuda {

// Packed queries are one batch entry.
template <typename Params>
TensorSizes query_sizes(const Params& p) {
  return is_packed(p) ? TensorSizes{p.packed.total_q, p.head_dim, p.q_heads, 1}
                      : TensorSizes{p.q_len, p.head_dim, p.q_heads, p.batch};
}

// So are packed keys, and pages are an entry each.
template <typename Params>
TensorSizes key_sizes(const Params& p) {
  const PackedSequences& packed = p.packed;
  if (packed.page_table != nullptr) {
    return {packed.page_len, p.head_dim, p.kv_heads, packed.num_pages};
  }
  return is_packed(p) ? TensorSizes{packed.total_kv, p.head_dim, p.kv_heads, 1}
                      : TensorSizes{p.kv_len, p.head_dim, p.kv_heads, p.batch};
}

}  // namespace proxyattn::cuda
