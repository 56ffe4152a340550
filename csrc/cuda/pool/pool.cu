#include "proxyattn/pool.h"

#include "common/math.h"
#include "common/validate.h"
#include "cuda/common/launch.h"
#include "cuda/common/limits.h"
#include "cuda/common/tile.cuh"
#include "cuda/pool/pool_kernel.cuh"

namespace proxyattn::cuda {
namespace {

constexpr const char* kOp = "pool_heads";

bool is_aligned(const void* base, const TokenStrides& strides) {
  return rows_are_aligned(base, strides.batch, strides.token, strides.head);
}

PoolSide make_side(const PoolParams& p,
                   const void* source,
                   TokenStrides source_strides,
                   int64_t len,
                   int64_t heads,
                   void* proxy,
                   const TokenStrides& proxy_strides,
                   int64_t groups) {
  PoolSide side{};
  side.source = source;
  side.proxy = proxy;
  side.proxy_strides = proxy_strides;
  side.windows = ceil_div(len, p.stride);
  if (p.pooling == Pooling::kMean) {
    side.tokens = len;
    side.window_tokens = static_cast<int>(p.stride);
  } else {
    source_strides.token *= p.stride;
    side.tokens = side.windows;
    side.window_tokens = 1;
  }
  side.source_strides = source_strides;
  side.num_chunks = p.batch * side.windows * groups * (p.head_dim / kChunkElements);
  side.groups = static_cast<int>(groups);
  side.group_heads = static_cast<int>(heads / groups);
  side.source_aligned = is_aligned(source, source_strides);
  side.proxy_aligned = is_aligned(proxy, proxy_strides);
  return side;
}

}  // namespace

void pool_heads(const PoolParams& params, Stream stream) {
  validate_pool(params);
  check_dtype(kOp, params.dtype);
  PoolArgs args{};
  args.sides[0] = make_side(params, params.q, params.q_strides, params.q_len, params.q_heads,
                            params.q_proxy, params.q_proxy_strides, params.proxy_heads);
  args.sides[1] = make_side(params, params.k, params.k_strides, params.kv_len, params.kv_heads,
                            params.k_proxy, params.k_proxy_strides, params.key_proxy_heads());
  args.num_q_ctas = ceil_div<int64_t>(args.sides[0].num_chunks, kPoolThreads);
  while (params.head_dim >> args.row_chunks_log2 > kChunkElements) ++args.row_chunks_log2;
  LaunchShape shape{args.num_q_ctas + ceil_div<int64_t>(args.sides[1].num_chunks, kPoolThreads)};
  shape.threads = kPoolThreads;
  if (params.dtype == DType::kBFloat16) {
    launch<pool_heads_kernel<__nv_bfloat16>>(kOp, shape, stream, args);
  } else {
    launch<pool_heads_kernel<__half>>(kOp, shape, stream, args);
  }
}

}  // namespace proxyattn::cuda
