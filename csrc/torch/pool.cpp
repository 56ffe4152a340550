#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "common/math.h"
#include "common/validate.h"
#include "ops.h"

namespace proxyattn::binding {

TensorPair pool_heads(const at::Tensor& q,
                      const at::Tensor& k,
                      int64_t num_proxy_heads,
                      int64_t stride,
                      std::string_view pooling) {
  constexpr const char* kOp = "pool_heads";
  check_qk(kOp, q, k);
  const Backend& backend = backend_of(kOp, q);
  const c10::DeviceGuard guard(q.device());
  const Stream stream = backend.begin(q);

  PoolParams params{};
  params.batch = q.size(0);
  params.q_len = q.size(1);
  params.kv_len = k.size(1);
  params.q_heads = q.size(2);
  params.kv_heads = k.size(2);
  params.proxy_heads = num_proxy_heads;
  params.head_dim = q.size(3);
  params.stride = stride;
  params.pooling = pooling_of(kOp, pooling);
  params.dtype = dtype_of(q);
  validate_pool(params);

  const auto proxy = [&](int64_t tokens, int64_t heads) {
    return at::empty({params.batch, ceil_div(tokens, stride), heads, params.head_dim}, q.options());
  };
  at::Tensor q_proxy = proxy(params.q_len, num_proxy_heads);
  at::Tensor k_proxy = proxy(params.kv_len, params.key_proxy_heads());
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.q_proxy_strides = strides_of(q_proxy);
  params.k_proxy_strides = strides_of(k_proxy);
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.q_proxy = q_proxy.mutable_data_ptr();
  params.k_proxy = k_proxy.mutable_data_ptr();
  backend.pool_heads(params, stream);
  return {q_proxy, k_proxy};
}

}  // namespace proxyattn::binding
