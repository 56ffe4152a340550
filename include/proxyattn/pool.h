// Stage 1, pool_heads: the proxy heads, means of a group's heads at every stride-th token.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

namespace proxyattn {

struct PoolParams {
  int64_t batch;
  int64_t q_len;
  int64_t kv_len;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t proxy_heads;
  int64_t head_dim;
  int64_t stride;  // one token of each window of this many is kept: the first

  TokenStrides q_strides;
  TokenStrides k_strides;
  TokenStrides q_proxy_strides;
  TokenStrides k_proxy_strides;

  const void* q;  // [batch, q_len, q_heads, head_dim]
  const void* k;  // [batch, kv_len, kv_heads, head_dim]
  void* q_proxy;  // [batch, ceil(q_len / stride), proxy_heads, head_dim]
  void* k_proxy;  // [batch, ceil(kv_len / stride), proxy_heads, head_dim]

  DType dtype;
};

namespace cpu {
void pool_heads(const PoolParams& params);
}
namespace cuda {
void pool_heads(const PoolParams& params, Stream stream);
}

}  // namespace proxyattn
