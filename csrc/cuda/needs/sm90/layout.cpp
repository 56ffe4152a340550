// Which calls the sm90 family takes.
#include <cstdint>

#include "proxyattn/needs.h"

#include "cuda/common/tensor_map.h"
#include "cuda/needs/dispatch.h"
#include "cuda/sequences/packed.h"
#include "cuda/sm90/key_maps.h"

namespace proxyattn::cuda::sm90 {
namespace {

constexpr int64_t kMaxCount = int64_t{1} << 30;  // the kernel counts with 32 bits

}  // namespace

bool block_lse_fits(const NeedParams& p) {
  if (is_packed(p)) return false;
  const bool counted = p.kv_len <= kMaxCount && p.q_len <= kMaxCount && -kMaxCount <= p.q_offset &&
                       p.q_offset <= kMaxCount && p.batch * p.q_heads <= kMaxCount / (p.kv_len + 1);
  return counted && tensor_map_fits(p.q, {p.q_len, p.head_dim, p.q_heads, p.batch}, p.q_strides) &&
         key_maps_fit(p.k, {p.kv_len, p.head_dim, p.kv_heads, p.batch}, p.k_strides);
}

}  // namespace proxyattn::cuda::sm90
