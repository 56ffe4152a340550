// Stage 1 on the CPU: every sampled token's heads are added up in fp32, group by group.
#include "proxyattn/pool.h"

#include "common/math.h"
#include "common/validate.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace proxyattn::cpu {
namespace {

// Tokens of one task.
constexpr int64_t kTaskTokens = 64;

// One of the two tensors, q or k, and its pooled form.
struct Pooling {
  const void* in;
  TokenStrides in_strides;
  void* out;
  TokenStrides out_strides;
  int64_t num_tokens;  // sampled ones
  int64_t heads_per_group;
};

class Pooler {
 public:
  explicit Pooler(const PoolParams& params) : p_(params), kernels_(kernels()) {}

  void run() const {
    pool_all({p_.q, p_.q_strides, p_.q_proxy, p_.q_proxy_strides, ceil_div(p_.q_len, p_.stride),
              p_.q_heads / p_.proxy_heads});
    pool_all({p_.k, p_.k_strides, p_.k_proxy, p_.k_proxy_strides, ceil_div(p_.kv_len, p_.stride),
              p_.kv_heads / p_.proxy_heads});
  }

 private:
  void pool_all(const Pooling& pooling) const {
    const int64_t pieces = ceil_div(pooling.num_tokens, kTaskTokens);
    const double work = static_cast<double>(p_.batch * pooling.num_tokens) *
                        static_cast<double>(p_.proxy_heads * pooling.heads_per_group * p_.head_dim);
    parallel_for(p_.batch * pieces, num_workers(work), [&](int64_t task, int) {
      const int64_t begin = task % pieces * kTaskTokens;
      const int64_t end = min_of(begin + kTaskTokens, pooling.num_tokens);
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t c = 0; c < p_.proxy_heads; ++c) pool_token(pooling, task / pieces, t, c);
      }
    });
  }

  void pool_token(const Pooling& pooling, int64_t batch, int64_t t, int64_t group) const {
    const TokenStrides& in = pooling.in_strides;
    float sum[kMaxHeadDim] = {};
    float row[kMaxHeadDim];
    for (int64_t i = 0; i < pooling.heads_per_group; ++i) {
      const int64_t head = group * pooling.heads_per_group + i;
      const int64_t offset = batch * in.batch + t * p_.stride * in.token + head * in.head;
      kernels_.widen(p_.dtype, element_at(pooling.in, offset, p_.dtype), p_.head_dim, row);
      for (int64_t d = 0; d < p_.head_dim; ++d) sum[d] += row[d];
    }
    const float count = static_cast<float>(pooling.heads_per_group);
    for (int64_t d = 0; d < p_.head_dim; ++d) sum[d] /= count;
    const TokenStrides& out = pooling.out_strides;
    const int64_t offset = batch * out.batch + t * out.token + group * out.head;
    kernels_.narrow(p_.dtype, sum, p_.head_dim, element_at(pooling.out, offset, p_.dtype));
  }

  const PoolParams& p_;
  const Kernels& kernels_;
};

}  // namespace

void pool_heads(const PoolParams& params) {
  validate_pool(params);
  Pooler(params).run();
}

}  // namespace proxyattn::cpu
