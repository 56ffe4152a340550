// Stage 1, pool_heads, device code.
//
//   proxy[b, t, c, :] = mean over the heads h of group c of source[b, stride * t, h, :]
//
// Source [batch, tokens, heads, head_dim], proxy [batch, sampled tokens, groups, head_dim], both
// with any strides but a contiguous last dimension. One launch pools queries and keys: the first
// thread blocks work on the queries, the others on the keys.
//
// A thread owns one 16-byte chunk of one (b, t, c) and loops over the group's heads with
// kPoolLoads loads in flight; neighbouring threads own neighbouring chunks, then groups, then
// tokens, so that a warp reads whole cache lines. Sums are fp32, in head order, rounded once.
// No shared memory. The kernel is bound by memory: it reads every sampled token once.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "cuda/common/macros.cuh"
#include "cuda/common/vec.cuh"

namespace proxyattn::cuda {

inline constexpr int kPoolThreads = 256;
inline constexpr int kPoolLoads = 8;  // 16 KiB in flight per 128 threads
inline constexpr int64_t kMaxShortNumber = 0x7fffffff;

// One of the two tensors to pool. Strides are those of sampled tokens.
struct PoolSide {
  const void* source;
  void* proxy;
  TokenStrides source_strides;
  TokenStrides proxy_strides;
  int64_t tokens;      // sampled tokens
  int64_t num_chunks;  // 16-byte chunks of the whole proxy tensor
  int groups;
  int group_heads;
  bool source_aligned;
  bool proxy_aligned;
};

template <typename Element>
PROXYATTN_DEVICE void add_chunk(float (&sums)[kChunkElements], const uint4& chunk) {
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  PROXYATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 values = unpack_pair<Element>(pairs[i]);
    sums[2 * i] += values.x;
    sums[2 * i + 1] += values.y;
  }
}

// Each sampled token is read once, so the loads should not displace what the caches hold.
template <typename Element>
PROXYATTN_DEVICE void add_heads(float (&sums)[kChunkElements],
                                const Element* source,
                                int64_t head_stride,
                                int num_heads) {
  for (int first = 0; first < num_heads; first += kPoolLoads) {
    uint4 chunks[kPoolLoads];
    PROXYATTN_UNROLL
    for (int i = 0; i < kPoolLoads; ++i) {
      const Element* head = source + (first + i) * head_stride;
      if (first + i < num_heads) chunks[i] = __ldcs(reinterpret_cast<const uint4*>(head));
    }
    PROXYATTN_UNROLL
    for (int i = 0; i < kPoolLoads; ++i) {
      if (first + i < num_heads) add_chunk<Element>(sums, chunks[i]);
    }
  }
}

template <typename Element>
PROXYATTN_DEVICE uint4
mean_of_heads(const Element* source, int64_t head_stride, int num_heads, bool aligned) {
  float sums[kChunkElements] = {};
  if (aligned) {
    add_heads(sums, source, head_stride, num_heads);
  } else {
    PROXYATTN_NO_UNROLL
    for (int head = 0; head < num_heads; ++head) {
      add_chunk<Element>(sums, gather_chunk(source + head * head_stride));
    }
  }
  PROXYATTN_UNROLL
  for (float& sum : sums) sum = __fdiv_rn(sum, static_cast<float>(num_heads));
  return {pack_pair<Element>(sums[0], sums[1]), pack_pair<Element>(sums[2], sums[3]),
          pack_pair<Element>(sums[4], sums[5]), pack_pair<Element>(sums[6], sums[7])};
}

struct PoolArgs {
  PoolSide sides[2];  // queries, keys
  int64_t num_q_ctas;
  int row_chunks_log2;  // of the chunks in a row of head_dim
};

// Which output chunk of a side a thread owns.
struct PoolPlace {
  int64_t batch;
  int64_t token;
  int group;
  int column;  // element of head_dim

  // Numbers in 32 bits where they fit: a division of 64 bits takes longer than a load.
  template <typename Number>
  static PROXYATTN_DEVICE PoolPlace of(const PoolSide& side, int row_chunks_log2, Number chunk) {
    const Number row = chunk >> row_chunks_log2;  // (b, t, c)
    const Number column = chunk - (row << row_chunks_log2);
    const Number groups = static_cast<Number>(side.groups);
    const Number tokens = static_cast<Number>(side.tokens);
    const Number sample = row / groups;  // (b, t)
    const Number batch = sample / tokens;
    return {static_cast<int64_t>(batch), static_cast<int64_t>(sample - batch * tokens),
            static_cast<int>(row - sample * groups), static_cast<int>(column) * kChunkElements};
  }
};

template <typename Element>
__global__ void __launch_bounds__(kPoolThreads)
    pool_heads_kernel(const __grid_constant__ PoolArgs args) {
  const bool is_k = blockIdx.x >= args.num_q_ctas;
  const PoolSide& side = args.sides[is_k];
  const int64_t cta = is_k ? blockIdx.x - args.num_q_ctas : blockIdx.x;
  const int64_t chunk = cta * kPoolThreads + threadIdx.x;
  if (chunk >= side.num_chunks) return;
  const PoolPlace at =
      side.num_chunks <= kMaxShortNumber
          ? PoolPlace::of<uint32_t>(side, args.row_chunks_log2, static_cast<uint32_t>(chunk))
          : PoolPlace::of<int64_t>(side, args.row_chunks_log2, chunk);

  const TokenStrides& from = side.source_strides;
  const Element* source = static_cast<const Element*>(side.source) + at.batch * from.batch +
                          at.token * from.token + int64_t{at.group} * side.group_heads * from.head +
                          at.column;
  const uint4 mean = mean_of_heads(source, from.head, side.group_heads, side.source_aligned);

  const TokenStrides& to = side.proxy_strides;
  Element* proxy = static_cast<Element*>(side.proxy) + at.batch * to.batch + at.token * to.token +
                   at.group * to.head + at.column;
  if (side.proxy_aligned) {
    *reinterpret_cast<uint4*>(proxy) = mean;
  } else {
    scatter_chunk(proxy, mean);
  }
}

}  // namespace proxyattn::cuda
