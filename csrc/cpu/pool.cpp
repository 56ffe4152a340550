// Stage 1 on the CPU: the tokens and heads of every window are added up in fp32, group by group.
#include "proxyattn/pool.h"

#include "common/math.h"
#include "common/validate.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace proxyattn::cpu {
namespace {

// Windows of one task.
constexpr int64_t kTaskWindows = 64;

// One of the two tensors, q or k, and its pooled form.
struct Side {
  const void* in;
  TokenStrides in_strides;
  void* out;
  TokenStrides out_strides;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t num_groups;
};

class Pooler {
 public:
  explicit Pooler(const PoolParams& params) : p_(params), kernels_(kernels()) {}

  void run() const {
    pool(
        {p_.q, p_.q_strides, p_.q_proxy, p_.q_proxy_strides, p_.q_len, p_.q_heads, p_.proxy_heads});
    pool({p_.k, p_.k_strides, p_.k_proxy, p_.k_proxy_strides, p_.kv_len, p_.kv_heads,
          p_.key_proxy_heads()});
  }

 private:
  void pool(const Side& side) const {
    const int64_t num_windows = ceil_div(side.num_tokens, p_.stride);
    const int64_t pieces = ceil_div(num_windows, kTaskWindows);
    const int64_t num_read = p_.pooling == Pooling::kMean ? side.num_tokens : num_windows;
    const double work = static_cast<double>(p_.batch * num_read) *
                        static_cast<double>(side.num_heads * p_.head_dim);
    parallel_for(p_.batch * pieces, num_workers(work), [&](int64_t task, int) {
      const int64_t begin = task % pieces * kTaskWindows;
      const int64_t end = min_of(begin + kTaskWindows, num_windows);
      for (int64_t window = begin; window < end; ++window) {
        for (int64_t group = 0; group < side.num_groups; ++group) {
          pool_window(side, task / pieces, window, group);
        }
      }
    });
  }

  void pool_window(const Side& side, int64_t batch, int64_t window, int64_t group) const {
    const TokenStrides& in = side.in_strides;
    const int64_t heads = side.num_heads / side.num_groups;
    const int64_t first = window * p_.stride;
    const int64_t tokens =
        p_.pooling == Pooling::kMean ? min_of(p_.stride, side.num_tokens - first) : 1;
    float sum[kMaxHeadDim] = {};
    float row[kMaxHeadDim];
    for (int64_t token = first; token < first + tokens; ++token) {
      for (int64_t head = group * heads; head < (group + 1) * heads; ++head) {
        const int64_t offset = batch * in.batch + token * in.token + head * in.head;
        kernels_.widen(p_.dtype, element_at(side.in, offset, p_.dtype), p_.head_dim, row);
        for (int64_t d = 0; d < p_.head_dim; ++d) sum[d] += row[d];
      }
    }
    const float count = static_cast<float>(tokens * heads);
    for (int64_t d = 0; d < p_.head_dim; ++d) sum[d] /= count;
    const TokenStrides& out = side.out_strides;
    const int64_t offset = batch * out.batch + window * out.token + group * out.head;
    kernels_.narrow(p_.dtype, sum, p_.head_dim, element_at(side.out, offset, p_.dtype));
  }

  const PoolParams& p_;
  const Kernels& kernels_;
};

}  // namespace

void pool_heads(const PoolParams& params) {
  validate_pool(params);
  validate_not_packed("pool_heads", params.packed);
  Pooler(params).run();
}

}  // namespace proxyattn::cpu
