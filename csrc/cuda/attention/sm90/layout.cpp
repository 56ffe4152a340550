// Which calls the sm90 family takes.
#include <cstdint>

#include "proxyattn/attention.h"

#include "cuda/attention/dispatch.h"
#include "cuda/attention/sm90/config.h"
#include "cuda/attention/sm90/tile_order.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sequences/tensor_sizes.h"

namespace proxyattn::cuda::sm90 {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 30;  // coordinates and list places have 32 bits
constexpr int64_t kMaxTiles = int64_t{1} << 30;

}  // namespace

bool fits(const AttentionParams& p) {
  const int64_t key_rows = tile_config(static_cast<int>(p.head_dim)).key_rows;
  const bool large = p.q_block == kQueryRows && p.kv_block % key_rows == 0;
  const bool small =
      (p.q_block == kQueryRows || p.q_block == kSmallBlock) && p.kv_block == kSmallBlock;
  const bool tiled = large || small;
  const bool counted = 0 < p.kv_len && p.kv_len <= kMaxTokens && p.q_len <= kMaxTokens &&
                       -kMaxTokens <= p.q_offset && p.q_offset <= kMaxTokens &&
                       p.list_capacity <= kMaxTokens &&
                       batch_entries(p) * p.q_heads * (p.rows.end - p.rows.begin) <= kMaxTiles &&
                       p.packed.total_q <= kMaxTokens && p.packed.total_kv <= kMaxTokens &&
                       p.packed.num_pages <= kMaxTokens;
  const TensorSizes queries = query_sizes(p);
  const TensorSizes keys = key_sizes(p);
  // Packed calls may have neither tokens nor pages; a tensor map of nothing is not valid.
  const bool anything = queries.tokens > 0 && keys.tokens > 0 && keys.batch > 0;
  return tiled && counted && anything && tensor_map_fits(p.q, queries, p.q_strides) &&
         tensor_map_fits(p.k, keys, p.k_strides) && tensor_map_fits(p.v, keys, p.v_strides) &&
         tensor_map_fits(p.out, queries, p.out_strides);
}

int64_t workspace_bytes(const AttentionParams&) {
  return kCounterBytes;
}

}  // namespace proxyattn::cuda::sm90
