// Stage 1, pool_heads, device code.
//
//   proxy[b, w, c, :] = mean over the tokens t of window w and the heads h of group c
//                       of source[b, t, h, :]
//
// Source [batch, tokens, heads, head_dim], proxy [batch, windows, groups, head_dim], both with any
// strides but a contiguous last dimension. Pooling by the first token of a window is pooling of
// that token alone. One launch pools queries and keys: the first thread blocks work on the queries,
// the others on the keys.
//
// Packed sequences are one batch entry, whose windows are numbered as windows.h says. How many
// there are the device knows, so a fixed number of thread blocks takes them in turn, and capacities
// far above what is used cost nothing.
//
// A thread owns one 16-byte chunk of one (b, w, c) and loops over the window's tokens and the
// group's heads with kPoolLoads loads in flight; neighbouring threads own neighbouring chunks, then
// groups, then windows, so that a warp reads whole cache lines. Sums are fp32, token by token and
// in head order, rounded once. No shared memory. The kernel is bound by memory: it reads every
// token once.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "common/math.h"
#include "cuda/common/macros.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/pool/windows.h"

namespace proxyattn::cuda {

inline constexpr int kPoolThreads = 256;
inline constexpr int kPoolLoads = 8;  // 16 KiB in flight per 128 threads
inline constexpr int64_t kMaxShortNumber = 0x7fffffff;

// One of the two tensors to pool.
struct PoolSide {
  const void* source;
  void* proxy;
  TokenStrides source_strides;
  TokenStrides proxy_strides;
  int64_t tokens;      // of a batch entry; not of packed sequences
  int64_t windows;     // of a batch entry
  int64_t num_chunks;  // 16-byte chunks of the whole proxy tensor
  int stride;          // tokens from one window to the next
  int window_tokens;   // that are looked at; the last window may have fewer
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

// The rows that one mean is taken of: a window's tokens, and of each the group's heads.
template <typename Element>
struct WindowRows {
  const Element* next;  // this thread's chunk of the next row
  int64_t head_stride;
  int64_t token_step;  // from a token's last head to the first of the next token
  int num_heads;
  int num_rows;
  int head = 0;

  PROXYATTN_DEVICE const Element* take() {
    const Element* row = next;
    const bool last = ++head == num_heads;
    next += last ? token_step : head_stride;
    if (last) head = 0;
    return row;
  }
};

// Each token is read once, so the loads should not displace what the caches hold.
template <typename Element>
PROXYATTN_DEVICE void add_rows(float (&sums)[kChunkElements], WindowRows<Element> rows) {
  for (int first = 0; first < rows.num_rows; first += kPoolLoads) {
    uint4 chunks[kPoolLoads];
    PROXYATTN_UNROLL
    for (int i = 0; i < kPoolLoads; ++i) {
      if (first + i < rows.num_rows) {
        chunks[i] = __ldcs(reinterpret_cast<const uint4*>(rows.take()));
      }
    }
    PROXYATTN_UNROLL
    for (int i = 0; i < kPoolLoads; ++i) {
      if (first + i < rows.num_rows) add_chunk<Element>(sums, chunks[i]);
    }
  }
}

template <typename Element>
PROXYATTN_DEVICE uint4 mean_of_rows(WindowRows<Element> rows, bool aligned) {
  float sums[kChunkElements] = {};
  if (aligned) {
    add_rows(sums, rows);
  } else {
    PROXYATTN_NO_UNROLL
    for (int i = 0; i < rows.num_rows; ++i) add_chunk<Element>(sums, gather_chunk(rows.take()));
  }
  PROXYATTN_UNROLL
  for (float& sum : sums) sum = __fdiv_rn(sum, static_cast<float>(rows.num_rows));
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
  int64_t window;
  int group;
  int column;  // element of head_dim

  // Numbers in 32 bits where they fit: a division of 64 bits takes longer than a load.
  template <typename Number>
  static PROXYATTN_DEVICE PoolPlace of(const PoolSide& side, int row_chunks_log2, Number chunk) {
    const Number row = chunk >> row_chunks_log2;  // (b, w, c)
    const Number column = chunk - (row << row_chunks_log2);
    const Number groups = static_cast<Number>(side.groups);
    const Number windows = static_cast<Number>(side.windows);
    const Number window = row / groups;  // (b, w)
    const Number batch = window / windows;
    return {static_cast<int64_t>(batch), static_cast<int64_t>(window - batch * windows),
            static_cast<int>(row - window * groups), static_cast<int>(column) * kChunkElements};
  }
};

PROXYATTN_DEVICE PoolPlace find_place(const PoolArgs& args, const PoolSide& side, int64_t chunk) {
  return side.num_chunks <= kMaxShortNumber
             ? PoolPlace::of<uint32_t>(side, args.row_chunks_log2, static_cast<uint32_t>(chunk))
             : PoolPlace::of<int64_t>(side, args.row_chunks_log2, chunk);
}

// One chunk of the proxy of a window that has tokens.
template <typename Element>
PROXYATTN_DEVICE uint4 pool_window(const PoolSide& side,
                                   const PoolPlace& at,
                                   const Window& window) {
  const TokenStrides& from = side.source_strides;
  WindowRows<Element> rows;
  rows.next = static_cast<const Element*>(side.source) + window.first.entry * from.batch +
              window.first.token * from.token + int64_t{at.group} * side.group_heads * from.head +
              at.column;
  rows.head_stride = from.head;
  rows.token_step = from.token - (side.group_heads - 1) * from.head;
  rows.num_heads = side.group_heads;
  rows.num_rows = side.group_heads * window.num_tokens;
  return mean_of_rows(rows, side.source_aligned);
}

template <typename Element>
PROXYATTN_DEVICE void store_proxy(const PoolSide& side, const PoolPlace& at, const uint4& chunk) {
  const TokenStrides& to = side.proxy_strides;
  Element* proxy = static_cast<Element*>(side.proxy) + at.batch * to.batch + at.window * to.token +
                   at.group * to.head + at.column;
  if (side.proxy_aligned) {
    *reinterpret_cast<uint4*>(proxy) = chunk;
  } else {
    scatter_chunk(proxy, chunk);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kPoolThreads)
    pool_heads_kernel(const __grid_constant__ PoolArgs args) {
  const bool is_k = blockIdx.x >= args.num_q_ctas;
  const PoolSide& side = args.sides[is_k];
  const int64_t cta = is_k ? blockIdx.x - args.num_q_ctas : blockIdx.x;
  const int64_t chunk = cta * kPoolThreads + threadIdx.x;
  if (chunk >= side.num_chunks) return;
  const PoolPlace at = find_place(args, side, chunk);
  const int64_t first = at.window * side.stride;
  const int64_t left = side.tokens - first;
  const Window window{{at.batch, first},
                      static_cast<int>(min_of<int64_t>(side.window_tokens, left))};
  store_proxy<Element>(side, at, pool_window<Element>(side, at, window));
}

template <typename Element>
__global__ void __launch_bounds__(kPoolThreads)
    pool_packed_kernel(const __grid_constant__ PoolArgs args,
                       const __grid_constant__ PackedWindows windows) {
  const bool is_k = blockIdx.x >= args.num_q_ctas;
  const PoolSide& side = args.sides[is_k];
  const int64_t cta = is_k ? blockIdx.x - args.num_q_ctas : blockIdx.x;
  const int64_t num_ctas = is_k ? gridDim.x - args.num_q_ctas : args.num_q_ctas;
  for (int64_t chunk = cta * kPoolThreads + threadIdx.x; chunk < side.num_chunks;
       chunk += num_ctas * kPoolThreads) {
    const PoolPlace at = find_place(args, side, chunk);
    const Window window = is_k ? windows.of_keys(at.window) : windows.of_queries(at.window);
    if (window.num_tokens == Window::kNoMore) return;
    if (window.num_tokens == 0) continue;
    uint4 proxy{};
    if (window.first.exists()) proxy = pool_window<Element>(side, at, window);
    store_proxy<Element>(side, at, proxy);
  }
}

}  // namespace proxyattn::cuda
