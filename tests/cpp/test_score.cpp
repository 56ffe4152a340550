// score_blocks on the CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "proxyattn/error.h"
#include "proxyattn/score.h"

#include "check.h"
#include "common/block_grid.h"
#include "common/validate.h"
#include "families.h"
#include "reference.h"
#include "tensors.h"

namespace proxyattn {
namespace {

using test::Tensor;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Case {
  int64_t batch, q_len, kv_len, proxy_heads, head_dim, stride, block;
  bool causal;
  DType dtype;
  int64_t readers = 1;  // proxies of one key proxy

  int64_t q_samples() const { return ceil_div(q_len, stride); }
  int64_t kv_samples() const { return ceil_div(kv_len, stride); }
  int64_t key_proxy_heads() const { return proxy_heads / readers; }
  int64_t num_rows() const { return ceil_div(q_len, block); }
  int64_t num_blocks() const { return ceil_div(kv_len, block); }
};

struct Scores {
  std::vector<float> peak;
  std::vector<float> mass;
};

constexpr float kScale = 0.3f;

Scores score(const Case& c, const Tensor& q, const Tensor& k, BlockRange rows) {
  ScoreParams p{};
  p.batch = c.batch;
  p.q_len = c.q_len;
  p.kv_len = c.kv_len;
  p.proxy_heads = c.proxy_heads;
  p.key_proxy_heads = k.heads;
  p.head_dim = c.head_dim;
  p.stride = c.stride;
  p.q_block = c.block;
  p.kv_block = c.block;
  p.q_offset = c.kv_len - c.q_len;
  p.rows = rows;
  p.q_proxy_strides = q.strides;
  p.k_proxy_strides = k.strides;
  p.q_proxy = q.data();
  p.k_proxy = k.data();
  p.scale = kScale;
  p.causal = c.causal;
  p.dtype = c.dtype;
  const auto size =
      static_cast<std::size_t>(c.batch * c.proxy_heads * (rows.end - rows.begin) * c.num_blocks());
  Scores out{std::vector<float>(size, 77.0f), std::vector<float>(size, 77.0f)};
  p.peak = out.peak.data();
  p.mass = out.mass.data();
  const test::Workspace workspace(p, cpu::score_blocks_workspace_bytes(p));
  cpu::score_blocks(p);
  return out;
}

Scores score(const Case& c, const Tensor& q, const Tensor& k) {
  return score(c, q, k, {0, c.num_rows()});
}

// One query block of one head, from the formulas.
void check_row(const Case& c,
               const Tensor& q,
               const Tensor& k,
               int64_t batch,
               int64_t head,
               int64_t m,
               const float* peak,
               const float* mass) {
  const auto num_blocks = static_cast<std::size_t>(c.num_blocks());
  std::vector<double> largest(num_blocks, -INFINITY), total(num_blocks, 0.0);
  int64_t num_rows = 0;
  for (int64_t i = m * c.block; i < min_of((m + 1) * c.block, c.q_len); i += c.stride) {
    ++num_rows;
    int64_t seen = 0;  // sampled keys at or before the row's position
    while (seen < c.kv_samples() && (!c.causal || seen * c.stride <= c.kv_len - c.q_len + i)) {
      ++seen;
    }
    const std::vector<double> logs = test::log_softmax(
        q, {batch, i / c.stride, head}, k, head / c.readers, seen, static_cast<double>(kScale));
    for (int64_t j = 0; j < seen; ++j) {
      const auto n = static_cast<std::size_t>(j * c.stride / c.block);
      largest[n] = std::max(largest[n], logs[static_cast<std::size_t>(j)]);
      total[n] += std::exp(logs[static_cast<std::size_t>(j)]);
    }
  }
  double row_sum = 0.0;
  for (std::size_t n = 0; n < num_blocks; ++n) {
    CHECK_NEAR(peak[n], largest[n], 2e-5);
    CHECK_NEAR(mass[n], total[n] / static_cast<double>(num_rows), 2e-6);
    row_sum += static_cast<double>(mass[n]);
  }
  CHECK_NEAR(row_sum, 1.0, 1e-5);
}

void check_case(const Case& c) {
  const Tensor q =
      Tensor(c.dtype, c.batch, c.q_samples(), c.proxy_heads, c.head_dim, 8).fill_normal(1);
  const Tensor k =
      Tensor(c.dtype, c.batch, c.kv_samples(), c.key_proxy_heads(), c.head_dim, 24).fill_normal(2);
  const Scores scores = score(c, q, k);
  const float* peak = scores.peak.data();
  const float* mass = scores.mass.data();
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.proxy_heads; ++h) {
      for (int64_t m = 0; m < c.num_rows(); ++m) {
        check_row(c, q, k, b, h, m, peak, mass);
        peak += c.num_blocks();
        mass += c.num_blocks();
      }
    }
  }
}

TEST(random_scores) {
  test::for_each_family([] {
    for (const DType dtype : test::kAllDTypes) {
      check_case({2, 300, 300, 2, 64, 4, 64, true, dtype});
      check_case({1, 129, 400, 1, 128, 2, 128, true, dtype});
    }
    for (const int64_t stride : kStrides) {
      for (const int64_t block : kBlockSizes) {
        check_case({1, 257, 259, 1, 64, stride, block, true, DType::kFloat32});
        check_case({1, 131, 67, 1, 64, stride, block, false, DType::kFloat32});
      }
    }
    check_case({2, 200, 300, 6, 64, 4, 64, true, DType::kFloat32, 3});
    check_case({2, 200, 300, 4, 64, 4, 64, true, DType::kBFloat16, 4});
    check_case({1, 1, 1, 1, 256, 1, 64, true, DType::kFloat32});
    check_case({1, 1, 1000, 1, 256, 8, 64, true, DType::kFloat32});
    check_case({1, 1500, 1500, 1, 64, 8, 64, true, DType::kFloat32});
  });
}

TEST(two_keys_by_hand) {
  // Keys 0 and 64 score 1 and 0 for every query, all others 0 in the first dimension: with stride 8
  // each block of 64 has 8 sampled keys. exp(1) + 15 in the denominator for the last query block.
  const Case c{1, 128, 128, 1, 64, 8, 64, false, DType::kFloat32};
  Tensor q(c.dtype, 1, 16, 1, 64), k(c.dtype, 1, 16, 1, 64);
  for (int64_t t = 0; t < 16; ++t) {
    for (int64_t d = 0; d < 64; ++d) {
      q.set(0, t, 0, d, d == 0 ? 1.0f / kScale : 0.0f);
      k.set(0, t, 0, d, d == 0 && t == 0 ? 1.0f : 0.0f);
    }
  }
  const Scores scores = score(c, q, k);
  const double denominator = 2.718281828459045 + 15.0;
  CHECK_NEAR(scores.peak[0], 1.0 - std::log(denominator), 1e-6);
  CHECK_NEAR(scores.peak[1], -std::log(denominator), 1e-6);
  CHECK_NEAR(scores.mass[0], (2.718281828459045 + 7.0) / denominator, 1e-6);
  CHECK_NEAR(scores.mass[3], 8.0 / denominator, 1e-6);
}

TEST(ranges_of_rows_and_threads_give_the_same_bits) {
  test::for_each_family([] {
    const Case c{1, 1000, 1100, 2, 64, 4, 64, true, DType::kFloat32};
    const Tensor q = Tensor(c.dtype, 1, c.q_samples(), 2, 64).fill_normal(1);
    const Tensor k = Tensor(c.dtype, 1, c.kv_samples(), 2, 64).fill_normal(2);
    const Scores whole = score(c, q, k);
    test::for_some_thread_counts([&] { CHECK(score(c, q, k).peak == whole.peak); });
    const auto num_blocks = static_cast<std::size_t>(c.num_blocks());
    for (int64_t begin = 0; begin < c.num_rows(); ++begin) {
      const int64_t end = min_of<int64_t>(begin + 3, c.num_rows());
      const Scores part = score(c, q, k, {begin, end});
      const auto part_size = static_cast<std::size_t>(end - begin) * num_blocks;
      for (std::size_t h = 0; h < 2; ++h) {
        const std::size_t at =
            (h * static_cast<std::size_t>(c.num_rows()) + static_cast<std::size_t>(begin)) *
            num_blocks;
        for (std::size_t i = 0; i < part_size; ++i) {
          CHECK_EQ(part.peak[h * part_size + i], whole.peak[at + i]);
          CHECK_EQ(part.mass[h * part_size + i], whole.mass[at + i]);
        }
      }
    }
  });
}

TEST(nan_spoils_the_rows_that_see_it) {
  test::for_each_family([] {
    const Case c{1, 256, 256, 1, 64, 4, 64, true, DType::kFloat32};
    const Tensor q = Tensor(c.dtype, 1, 64, 1, 64).fill_normal(1);
    Tensor k = Tensor(c.dtype, 1, 64, 1, 64).fill_normal(2);
    k.set(0, 33, 0, 5, kNan);  // token 132, in block 2
    const Scores scores = score(c, q, k);
    for (std::size_t m = 0; m < 4; ++m) {
      for (std::size_t n = 0; n < 4; ++n) {
        const float peak = scores.peak[m * 4 + n];
        if (n > m) CHECK_EQ(peak, -INFINITY);
        if (n <= m) CHECK_EQ(std::isnan(peak), m >= 2);
        if (n <= m) CHECK_EQ(std::isnan(scores.mass[m * 4 + n]), m >= 2);
        if (n > m) CHECK_EQ(scores.mass[m * 4 + n], 0.0f);
      }
    }
  });
}

TEST(large_scores_keep_their_differences) {
  const Case c{1, 128, 128, 1, 64, 1, 64, true, DType::kFloat32};
  const Tensor q = Tensor(c.dtype, 1, 128, 1, 64).fill_normal(1, 60.0f);
  const Tensor k = Tensor(c.dtype, 1, 128, 1, 64).fill_normal(2, 60.0f);
  const Scores scores = score(c, q, k);
  double max_score = 0.0;
  for (int64_t i = 0; i < 128; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      max_score = std::max(max_score, std::fabs(test::dot(q, {0, i, 0}, k, {0, j, 0})) * 0.3);
    }
  }
  CHECK(max_score > 20000.0);
  for (int64_t m = 0; m < 2; ++m) {
    double largest = -INFINITY;
    for (int64_t i = m * 64; i < (m + 1) * 64; ++i) {
      const std::vector<double> logs =
          test::log_softmax(q, {0, i, 0}, k, 0, i + 1, static_cast<double>(kScale));
      largest = std::max(
          largest, *std::max_element(logs.begin(), logs.begin() + min_of<int64_t>(i + 1, 64)));
    }
    CHECK_NEAR(scores.peak[static_cast<std::size_t>(m) * 2], largest, 1e-4 + 2e-6 * max_score);
  }
}

TEST(empty_inputs) {
  const Case no_queries{1, 0, 64, 1, 64, 1, 64, true, DType::kFloat32};
  const Tensor none(DType::kFloat32, 1, 0, 1, 64);
  const Tensor some = Tensor(DType::kFloat32, 1, 64, 1, 64).fill_normal(1);
  CHECK(score(no_queries, none, some).peak.empty());
  const Case no_keys{1, 64, 0, 1, 64, 1, 64, false, DType::kFloat32};
  CHECK(score(no_keys, some, none).peak.empty());
}

TEST(rules) {
  Case c{1, 64, 64, 1, 64, 1, 64, true, DType::kFloat32};
  const Tensor x = Tensor(DType::kFloat32, 1, 64, 1, 64).fill_normal(1);
  CHECK_THROWS(InvalidArgument,
               "score_blocks: rows must be a range of query blocks in [0, 1], got [0, 2)",
               score(c, x, x, {0, 2}));
  const Tensor two(DType::kFloat32, 1, 64, 2, 64);
  CHECK_THROWS(InvalidArgument,
               "score_blocks: k_proxy must have heads that divide those of q_proxy, got "
               "k_proxy.size(2)=2, q_proxy.size(2)=1",
               score(c, x, two));
  validate_aligned_lengths("score_blocks", 65, 64, /*causal=*/false);
  CHECK_THROWS(InvalidArgument,
               "score_blocks: q_len must be at most kv_len when causal, got q_len=65, kv_len=64",
               validate_aligned_lengths("score_blocks", 65, 64, /*causal=*/true));
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
