// Which calls the sm90 family takes.
#include "cuda/needs/layout.h"

#include <cstdint>

#include "proxyattn/needs.h"

#include "common/sequence.h"
#include "cuda/common/tensor_map.h"
#include "cuda/needs/dispatch.h"
#include "cuda/sequences/packed.h"
#include "cuda/sequences/tensor_sizes.h"
#include "cuda/sm90/key_maps.h"

namespace proxyattn::cuda::sm90 {
namespace {

constexpr int64_t kMaxCount = int64_t{1} << 30;  // the kernel counts with 32 bits

bool is_counted(int64_t count) {
  return 0 < count && count <= kMaxCount;
}

}  // namespace

bool block_lse_fits(const NeedParams& p) {
  const TensorSizes queries = query_sizes(p);
  const TensorSizes keys = key_sizes(p);
  const NeedLayout layout(p);
  const bool counted = is_counted(p.q_len) && is_counted(p.kv_len) && is_counted(queries.tokens) &&
                       is_counted(keys.tokens) && is_counted(keys.batch) &&
                       (is_packed(p) || (-kMaxCount <= p.q_offset && p.q_offset <= kMaxCount)) &&
                       layout.heads <= kMaxCount / (layout.num_kv_blocks + 1);
  if (!counted || !tensor_map_fits(p.q, queries, p.q_strides)) return false;
  return p.packed.page_table == nullptr ? key_maps_fit(p.k, keys, p.k_strides)
                                        : tensor_map_fits(p.k, keys, p.k_strides);
}

}  // namespace proxyattn::cuda::sm90
