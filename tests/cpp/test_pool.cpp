// pool_heads on the CPU.
#include <cmath>
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

struct Settings {
  int64_t proxy_heads;
  int64_t stride;
  Pooling pooling = Pooling::kMean;
};

// Of the first `q_len` and `kv_len` tokens.
Pooled pool(const Tensor& q, const Tensor& k, const Settings& s, int64_t q_len, int64_t kv_len) {
  PoolParams p{};
  p.batch = q.batch;
  p.q_len = q_len;
  p.kv_len = kv_len;
  p.q_heads = q.heads;
  p.kv_heads = k.heads;
  p.proxy_heads = s.proxy_heads;
  p.head_dim = q.head_dim;
  p.stride = s.stride;
  p.q_strides = q.strides;
  p.k_strides = k.strides;
  p.q = q.data();
  p.k = k.data();
  p.pooling = s.pooling;
  p.dtype = q.dtype;
  Pooled out{Tensor(q.dtype, q.batch, ceil_div(q_len, s.stride), s.proxy_heads, q.head_dim, 8),
             Tensor(k.dtype, k.batch, ceil_div(kv_len, s.stride), min_of(s.proxy_heads, k.heads),
                    k.head_dim, 16)};
  p.q_proxy_strides = out.q.strides;
  p.k_proxy_strides = out.k.strides;
  p.q_proxy = out.q.data();
  p.k_proxy = out.k.data();
  cpu::pool_heads(p);
  return out;
}

Pooled pool(const Tensor& q, const Tensor& k, const Settings& settings) {
  return pool(q, k, settings, q.tokens, k.tokens);
}

void check_mean(const Tensor& pooled, const Tensor& x, const Settings& s) {
  const int64_t size = x.heads / pooled.heads;
  for (int64_t b = 0; b < x.batch; ++b) {
    for (int64_t t = 0; t < pooled.tokens; ++t) {
      const int64_t first = t * s.stride;
      const int64_t end =
          s.pooling == Pooling::kMean ? min_of(first + s.stride, x.tokens) : first + 1;
      const auto count = static_cast<double>(size * (end - first));
      for (int64_t c = 0; c < pooled.heads; ++c) {
        for (int64_t d = 0; d < x.head_dim; ++d) {
          double mean = 0.0, magnitude = 0.0;
          for (int64_t i = first; i < end; ++i) {
            for (int64_t h = c * size; h < (c + 1) * size; ++h) {
              mean += x.at(b, i, h, d) / count;
              magnitude += std::fabs(x.at(b, i, h, d));
            }
          }
          // One rounding to the type, and those of the sum in fp32.
          const double tolerance =
              std::fabs(mean) * test::rounding_unit(x.dtype) + magnitude * count * 0x1p-24;
          CHECK_NEAR(pooled.at(b, t, c, d), mean, tolerance);
        }
      }
    }
  }
}

// Five tokens, 4 query heads, 2 kv heads: token t of query head h is 100 t + 10 h, one more in the
// last dimension; that of kv head h is t + 7 h.
struct Counted {
  Tensor q{DType::kFloat32, 1, 5, 4, 64};
  Tensor k{DType::kFloat32, 1, 5, 2, 64};

  Counted() {
    for (int64_t t = 0; t < 5; ++t) {
      for (int64_t d = 0; d < 64; ++d) {
        for (int64_t h = 0; h < 4; ++h) {
          q.set(0, t, h, d, static_cast<float>(100 * t + 10 * h + (d == 63)));
        }
        for (int64_t h = 0; h < 2; ++h) k.set(0, t, h, d, static_cast<float>(t + 7 * h));
      }
    }
  }
};

TEST(first_tokens_by_hand) {
  test::for_each_family([] {
    const Counted x;
    const Pooled two = pool(x.q, x.k, {2, 2, Pooling::kFirst});
    CHECK_EQ(two.q.tokens, 3);
    CHECK_EQ(two.q.at(0, 0, 0, 0), 5.0);    // (0 + 10) / 2
    CHECK_EQ(two.q.at(0, 0, 1, 63), 26.0);  // (21 + 31) / 2
    CHECK_EQ(two.q.at(0, 2, 0, 0), 405.0);  // token 4
    CHECK_EQ(two.k.at(0, 1, 1, 0), 9.0);    // token 2, head 1 alone
    const Pooled one = pool(x.q, x.k, {1, 4, Pooling::kFirst});
    CHECK_EQ(one.q.at(0, 1, 0, 0), 415.0);  // token 4, all heads
    CHECK_EQ(one.k.at(0, 1, 0, 5), 7.5);
  });
}

TEST(window_means_by_hand) {
  test::for_each_family([] {
    const Counted x;
    const Pooled two = pool(x.q, x.k, {2, 2});
    CHECK_EQ(two.q.at(0, 0, 0, 0), 55.0);    // tokens 0 and 1: 5 and 105
    CHECK_EQ(two.q.at(0, 1, 1, 63), 276.0);  // tokens 2 and 3: 226 and 326
    CHECK_EQ(two.q.at(0, 2, 0, 0), 405.0);   // token 4 alone
    CHECK_EQ(two.k.at(0, 1, 1, 0), 9.5);     // tokens 2 and 3 of head 1: 9 and 10
    const Pooled one = pool(x.q, x.k, {1, 4});
    CHECK_EQ(one.q.at(0, 0, 0, 0), 165.0);  // tokens 0 to 3: 15, 115, 215, 315
    CHECK_EQ(one.k.at(0, 0, 0, 0), 5.0);    // 3.5, 4.5, 5.5, 6.5
    CHECK_EQ(one.k.at(0, 1, 0, 5), 7.5);    // token 4: 4 and 11
  });
}

TEST(more_proxies_than_kv_heads_share_them) {
  const Counted x;
  const Pooled four = pool(x.q, x.k, {4, 2});
  CHECK_EQ(four.q.heads, 4);
  CHECK_EQ(four.k.heads, 2);
  CHECK_EQ(four.q.at(0, 1, 3, 0), 280.0);  // head 3 alone, tokens 2 and 3
  CHECK_EQ(four.k.at(0, 0, 1, 0), 7.5);    // head 1, tokens 0 and 1
}

TEST(windows_end_with_the_sequence) {
  // What stands behind the last token is NaN.
  Counted x;
  for (int64_t h = 0; h < 4; ++h) x.q.set(0, 4, h, 0, NAN);
  for (int64_t h = 0; h < 2; ++h) x.k.set(0, 3, h, 0, NAN);
  const Pooled pooled = pool(x.q, x.k, {1, 8}, 4, 3);
  CHECK_EQ(pooled.q.at(0, 0, 0, 0), 165.0);
  CHECK_EQ(pooled.k.at(0, 0, 0, 0), 4.5);  // 3.5, 4.5, 5.5
}

TEST(random_heads) {
  test::for_each_family([] {
    for (const DType dtype : test::kAllDTypes) {
      for (const int64_t head_dim : kHeadDims) {
        const Tensor q = Tensor(dtype, 2, 35, 12, head_dim, 24).fill_normal(1);
        const Tensor k = Tensor(dtype, 2, 66, 6, head_dim).fill_normal(2);
        for (const int64_t stride : kStrides) {
          for (const int64_t proxy_heads : {2, 12}) {
            for (const Pooling pooling : {Pooling::kMean, Pooling::kFirst}) {
              const Settings settings{proxy_heads, stride, pooling};
              const Pooled pooled = pool(q, k, settings);
              check_mean(pooled.q, q, settings);
              check_mean(pooled.k, k, settings);
            }
          }
        }
      }
    }
  });
}

TEST(threads_change_nothing) {
  const Tensor q = Tensor(DType::kBFloat16, 1, 4000, 8, 128).fill_normal(1);
  const Tensor k = Tensor(DType::kBFloat16, 1, 4000, 2, 128).fill_normal(2);
  const Pooled expected = pool(q, k, {2, 1});
  test::for_some_thread_counts([&] {
    const Pooled pooled = pool(q, k, {2, 1});
    CHECK(pooled.q.same_bits(expected.q) && pooled.k.same_bits(expected.k));
  });
}

TEST(empty_inputs) {
  const Tensor none(DType::kFloat32, 0, 5, 4, 64), keys(DType::kFloat32, 0, 5, 2, 64);
  CHECK_EQ(pool(none, keys, {2, 4}).q.batch, 0);
  const Tensor no_queries(DType::kFloat32, 1, 0, 4, 64);
  const Tensor some = Tensor(DType::kFloat32, 1, 3, 2, 64).fill_normal(1);
  check_mean(pool(no_queries, some, {2, 1}).k, some, {2, 1});
}

TEST(rules) {
  const Tensor q(DType::kFloat32, 1, 4, 8, 64), k(DType::kFloat32, 1, 4, 4, 64);
  CHECK_THROWS(
      InvalidArgument,
      "pool_heads: num_proxy_heads must divide kv_heads or be a multiple of it that divides "
      "q_heads, got num_proxy_heads=3, kv_heads=4, q_heads=8",
      pool(q, k, {3, 4}));
  CHECK_THROWS(
      InvalidArgument,
      "pool_heads: num_proxy_heads must divide kv_heads or be a multiple of it that divides "
      "q_heads, got num_proxy_heads=0, kv_heads=4, q_heads=8",
      pool(q, k, {0, 4}));
  CHECK_THROWS(
      InvalidArgument,
      "pool_heads: num_proxy_heads must divide kv_heads or be a multiple of it that divides "
      "q_heads, got num_proxy_heads=16, kv_heads=4, q_heads=8",
      pool(q, k, {16, 4}));
  CHECK_THROWS(InvalidArgument, "pool_heads: stride must be one of 1, 2, 4, 8, got stride=3",
               pool(q, k, {2, 3}));
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
