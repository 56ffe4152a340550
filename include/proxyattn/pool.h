// Stage 1, pool_heads: the proxy heads, means of a group's heads over windows of tokens or at the
// first token of each.
#pragma once

#include <cstdint>

#include "proxyattn/sequences.h"
#include "proxyattn/types.h"

namespace proxyattn {

struct PoolParams {
  int64_t batch;
  int64_t q_len;
  int64_t kv_len;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t proxy_heads;  // divides kv_heads, or is a multiple of it that divides q_heads
  int64_t head_dim;
  int64_t stride;   // tokens of a window; the last one may be short
  int64_t q_block;  // packed sequences: proxies of queries are numbered by query blocks

  TokenStrides q_strides;
  TokenStrides k_strides;
  TokenStrides q_proxy_strides;
  TokenStrides k_proxy_strides;

  const void* q;  // [batch, q_len, q_heads, head_dim]
  const void* k;  // [batch, kv_len, kv_heads, head_dim]
  // Packed: those of query block m, of all sequences, from row m * (q_block / stride) on, those of
  // a sequence's keys from its first unit on; rows of no window stay as they are.
  void* q_proxy;  // [batch, ceil(q_len / stride), proxy_heads, head_dim]
  void* k_proxy;  // [batch, ceil(kv_len / stride), key_proxy_heads(), head_dim]

  Pooling pooling;
  DType dtype;
  PackedSequences packed;  // without q_starts: a batch

  // Several proxies may read one kv head: there are no copies of it.
  int64_t key_proxy_heads() const { return proxy_heads < kv_heads ? proxy_heads : kv_heads; }
};

namespace cpu {
void pool_heads(const PoolParams& params);
}
namespace cuda {
void pool_heads(const PoolParams& params, Stream stream);
}

}  // namespace proxyattn
