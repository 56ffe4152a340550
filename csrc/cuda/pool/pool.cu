#include "proxyattn/pool.h"

#include "common/math.h"
#include "common/validate.h"
#include "cuda/common/launch.h"
#include "cuda/common/limits.h"
#include "cuda/common/tile.cuh"
#include "cuda/pool/pool_kernel.cuh"
#include "cuda/pool/windows.h"
#include "cuda/sequences/packed.h"

namespace proxyattn::cuda {
namespace {

constexpr const char* kOp = "pool_heads";
// Thread blocks that take the windows of packed queries, and again of keys: a few times what runs
// at once, so that they end together.
constexpr int64_t kPackedCtasPerMultiprocessor = 16;

bool is_aligned(const void* base, const TokenStrides& strides) {
  return rows_are_aligned(base, strides.batch, strides.token, strides.head);
}

int window_tokens(const PoolParams& p) {
  return p.pooling == Pooling::kMean ? static_cast<int>(p.stride) : 1;
}

PoolSide make_side(const PoolParams& p,
                   const void* source,
                   const TokenStrides& source_strides,
                   int64_t heads,
                   void* proxy,
                   const TokenStrides& proxy_strides,
                   int64_t groups) {
  PoolSide side{};
  side.source = source;
  side.proxy = proxy;
  side.source_strides = source_strides;
  side.proxy_strides = proxy_strides;
  side.stride = static_cast<int>(p.stride);
  side.window_tokens = window_tokens(p);
  side.groups = static_cast<int>(groups);
  side.group_heads = static_cast<int>(heads / groups);
  side.source_aligned = is_aligned(source, source_strides);
  side.proxy_aligned = is_aligned(proxy, proxy_strides);
  return side;
}

// Of each batch entry.
void set_windows(PoolSide& side, const PoolParams& p, int64_t entries, int64_t windows) {
  side.windows = windows;
  side.num_chunks = entries * windows * side.groups * (p.head_dim / kChunkElements);
}

PoolArgs make_args(const PoolParams& p) {
  PoolArgs args{};
  args.sides[0] =
      make_side(p, p.q, p.q_strides, p.q_heads, p.q_proxy, p.q_proxy_strides, p.proxy_heads);
  args.sides[1] =
      make_side(p, p.k, p.k_strides, p.kv_heads, p.k_proxy, p.k_proxy_strides, p.key_proxy_heads());
  while (p.head_dim >> args.row_chunks_log2 > kChunkElements) ++args.row_chunks_log2;
  return args;
}

int64_t num_ctas(const PoolSide& side) {
  return ceil_div<int64_t>(side.num_chunks, kPoolThreads);
}

template <typename Element>
void pool_batch(const PoolParams& p, PoolArgs args, Stream stream) {
  const int64_t lengths[2] = {p.q_len, p.kv_len};
  for (int i = 0; i < 2; ++i) {
    args.sides[i].tokens = lengths[i];
    set_windows(args.sides[i], p, p.batch, ceil_div(lengths[i], p.stride));
  }
  args.num_q_ctas = num_ctas(args.sides[0]);
  LaunchShape shape{args.num_q_ctas + num_ctas(args.sides[1])};
  shape.threads = kPoolThreads;
  launch<pool_heads_kernel<Element>>(kOp, shape, stream, args);
}

template <typename Element>
void pool_packed(const PoolParams& p, PoolArgs args, Stream stream) {
  PackedWindows windows;
  windows.table = packed_table(p);
  windows.pages = PageTable(p.packed);
  windows.stride = static_cast<int>(p.stride);
  windows.window_tokens = window_tokens(p);
  windows.block_windows = static_cast<int>(p.q_block / p.stride);
  set_windows(args.sides[0], p, 1, int64_t{windows.table.max_q_blocks} * windows.block_windows);
  // Keys are pooled once, not again with every range of queries: then kv_len is 0.
  const int64_t key_units = p.kv_len == 0 ? 0 : windows.table.max_key_units;
  set_windows(args.sides[1], p, 1, key_units * kWindowUnit);
  const int64_t most =
      int64_t{device_attribute(kOp, cudaDevAttrMultiProcessorCount)} * kPackedCtasPerMultiprocessor;
  args.num_q_ctas = min_of(most, num_ctas(args.sides[0]));
  LaunchShape shape{args.num_q_ctas + min_of(most, num_ctas(args.sides[1]))};
  shape.threads = kPoolThreads;
  launch<pool_packed_kernel<Element>>(kOp, shape, stream, args, windows);
}

template <typename Element>
void pool(const PoolParams& params, Stream stream) {
  const PoolArgs args = make_args(params);
  if (is_packed(params)) {
    pool_packed<Element>(params, args, stream);
  } else {
    pool_batch<Element>(params, args, stream);
  }
}

}  // namespace

void pool_heads(const PoolParams& params, Stream stream) {
  validate_pool(params);
  validate_prepared(kOp, params.packed);
  check_dtype(kOp, params.dtype);
  if (params.batch == 0) return;
  if (params.dtype == DType::kBFloat16) {
    pool<__nv_bfloat16>(params, stream);
  } else {
    pool<__half>(params, stream);
  }
}

}  // namespace proxyattn::cuda
