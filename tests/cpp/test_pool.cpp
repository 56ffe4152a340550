// pool_heads on the CPU.
#include <cstdint>

#include "proxyattn/error.h"
#include "proxyattn/pool.h"

#include "check.h"
#include "common/math.h"
#include "families.h"
#include "tensors.h"

namespace proxyattn {
namespace {

using test::Tensor;

struct Pooled {
  Tensor q;
  Tensor k;
};

PoolParams params_of(const Tensor& q, const Tensor& k, int64_t proxy_heads, int64_t stride) {
  PoolParams p{};
  p.batch = q.batch;
  p.q_len = q.tokens;
  p.kv_len = k.tokens;
  p.q_heads = q.heads;
  p.kv_heads = k.heads;
  p.proxy_heads = proxy_heads;
  p.head_dim = q.head_dim;
  p.stride = stride;
  p.q_strides = q.strides;
  p.k_strides = k.strides;
  p.q = q.data();
  p.k = k.data();
  p.dtype = q.dtype;
  return p;
}

Pooled pool(const Tensor& q, const Tensor& k, int64_t proxy_heads, int64_t stride) {
  PoolParams p = params_of(q, k, proxy_heads, stride);
  Pooled out{Tensor(q.dtype, q.batch, ceil_div(q.tokens, stride), proxy_heads, q.head_dim, 8),
             Tensor(k.dtype, k.batch, ceil_div(k.tokens, stride), proxy_heads, k.head_dim, 16)};
  p.q_proxy_strides = out.q.strides;
  p.k_proxy_strides = out.k.strides;
  p.q_proxy = out.q.data();
  p.k_proxy = out.k.data();
  cpu::pool_heads(p);
  return out;
}

void check_mean(const Tensor& pooled, const Tensor& x, int64_t stride) {
  const int64_t size = x.heads / pooled.heads;
  for (int64_t b = 0; b < x.batch; ++b) {
    for (int64_t t = 0; t < pooled.tokens; ++t) {
      for (int64_t c = 0; c < pooled.heads; ++c) {
        for (int64_t d = 0; d < x.head_dim; ++d) {
          double mean = 0.0, magnitude = 0.0;
          for (int64_t i = 0; i < size; ++i) {
            mean += x.at(b, t * stride, c * size + i, d) / static_cast<double>(size);
            magnitude += std::fabs(x.at(b, t * stride, c * size + i, d));
          }
          // One rounding to the type, and those of the sum in fp32.
          const double tolerance = std::fabs(mean) * test::rounding_unit(x.dtype) +
                                   magnitude * static_cast<double>(size) * 0x1p-24;
          CHECK_NEAR(pooled.at(b, t, c, d), mean, tolerance);
        }
      }
    }
  }
}

TEST(a_group_by_hand) {
  test::for_each_family([] {
    Tensor q(DType::kFloat32, 1, 5, 4, 64), k(DType::kFloat32, 1, 5, 2, 64);
    for (int64_t t = 0; t < 5; ++t) {
      for (int64_t d = 0; d < 64; ++d) {
        for (int64_t h = 0; h < 4; ++h) {
          q.set(0, t, h, d, static_cast<float>(100 * t + 10 * h + (d == 63)));
        }
        for (int64_t h = 0; h < 2; ++h) k.set(0, t, h, d, static_cast<float>(t + 7 * h));
      }
    }
    const Pooled two = pool(q, k, 2, 2);
    CHECK_EQ(two.q.tokens, 3);
    CHECK_EQ(two.q.at(0, 0, 0, 0), 5.0);    // (0 + 10) / 2
    CHECK_EQ(two.q.at(0, 0, 1, 63), 26.0);  // (21 + 31) / 2
    CHECK_EQ(two.q.at(0, 2, 0, 0), 405.0);  // token 4
    CHECK_EQ(two.k.at(0, 1, 1, 0), 9.0);    // token 2, head 1 alone
    const Pooled one = pool(q, k, 1, 4);
    CHECK_EQ(one.q.at(0, 1, 0, 0), 415.0);  // token 4, all heads
    CHECK_EQ(one.k.at(0, 1, 0, 5), 7.5);
  });
}

TEST(random_heads) {
  test::for_each_family([] {
    for (const DType dtype : test::kAllDTypes) {
      for (const int64_t head_dim : kHeadDims) {
        const Tensor q = Tensor(dtype, 2, 67, 12, head_dim, 24).fill_normal(1);
        const Tensor k = Tensor(dtype, 2, 130, 6, head_dim).fill_normal(2);
        for (const int64_t stride : kStrides) {
          const Pooled pooled = pool(q, k, 2, stride);
          check_mean(pooled.q, q, stride);
          check_mean(pooled.k, k, stride);
        }
      }
    }
  });
}

TEST(threads_change_nothing) {
  const Tensor q = Tensor(DType::kBFloat16, 1, 4000, 8, 128).fill_normal(1);
  const Tensor k = Tensor(DType::kBFloat16, 1, 4000, 2, 128).fill_normal(2);
  const Pooled expected = pool(q, k, 2, 1);
  test::for_some_thread_counts([&] {
    const Pooled pooled = pool(q, k, 2, 1);
    CHECK(pooled.q.same_bits(expected.q) && pooled.k.same_bits(expected.k));
  });
}

TEST(empty_inputs) {
  const Tensor none(DType::kFloat32, 0, 5, 4, 64), keys(DType::kFloat32, 0, 5, 2, 64);
  CHECK_EQ(pool(none, keys, 2, 4).q.batch, 0);
  const Tensor no_queries(DType::kFloat32, 1, 0, 4, 64);
  const Tensor some = Tensor(DType::kFloat32, 1, 3, 2, 64).fill_normal(1);
  check_mean(pool(no_queries, some, 2, 1).k, some, 1);
}

TEST(rules) {
  const Tensor q(DType::kFloat32, 1, 4, 8, 64), k(DType::kFloat32, 1, 4, 8, 64);
  CHECK_THROWS(
      InvalidArgument,
      "pool_heads: num_proxy_heads must divide kv_heads, got num_proxy_heads=3, kv_heads=8",
      pool(q, k, 3, 4));
  CHECK_THROWS(InvalidArgument, "pool_heads: stride must be one of 1, 2, 4, 8, got stride=3",
               pool(q, k, 2, 3));
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
