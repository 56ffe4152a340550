// estimate_budgets and estimate_shares on the CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "proxyattn/error.h"
#include "proxyattn/needs.h"

#include "check.h"
#include "common/math.h"
#include "families.h"
#include "reference.h"
#include "tensors.h"

namespace proxyattn {
namespace {

using test::Tensor;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kScale = 0.3f;
constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

NeedParams params_of(const Tensor& q, const Tensor& k, int64_t block, bool causal) {
  NeedParams p{};
  p.batch = q.batch;
  p.q_len = q.tokens;
  p.kv_len = k.tokens;
  p.q_heads = q.heads;
  p.kv_heads = k.heads;
  p.head_dim = q.head_dim;
  p.q_block = block;
  p.kv_block = block;
  p.q_offset = k.tokens - q.tokens;
  p.q_strides = q.strides;
  p.k_strides = k.strides;
  p.q = q.data();
  p.k = k.data();
  p.scale = kScale;
  p.causal = causal;
  p.dtype = q.dtype;
  return p;
}

std::vector<int32_t> budgets(
    const Tensor& q, const Tensor& k, double gamma, int64_t block = 64, bool causal = true) {
  NeedParams p = params_of(q, k, block, causal);
  std::vector<int32_t> out(static_cast<std::size_t>(q.batch * q.heads), -7);
  p.mode = BudgetMode::kLastBlock;
  p.gamma = gamma;
  p.budgets = out.data();
  const test::Workspace workspace(p, cpu::estimate_needs_workspace_bytes(p));
  cpu::estimate_needs(p);
  return out;
}

struct Forced {
  int64_t num_sinks;
  int64_t num_local;
};

std::vector<float> shares(
    const Tensor& q, const Tensor& k, Forced forced, int64_t block = 64, bool causal = true) {
  NeedParams p = params_of(q, k, block, causal);
  std::vector<float> out(static_cast<std::size_t>(q.batch * q.heads), -7.0f);
  p.mode = BudgetMode::kTopP;
  p.gamma = static_cast<double>(kNan);  // not theirs
  p.num_sink_blocks = forced.num_sinks;
  p.num_local_blocks = forced.num_local;
  p.shares = out.data();
  const test::Workspace workspace(p, cpu::estimate_needs_workspace_bytes(p));
  cpu::estimate_needs(p);
  return out;
}

// Mass of each key block in the last queries of a head.
std::vector<double> block_mass(
    const Tensor& q, const Tensor& k, int64_t batch, int64_t head, int64_t block, bool causal) {
  std::vector<double> mass(static_cast<std::size_t>(ceil_div(k.tokens, block)), 0.0);
  const int64_t num_rows = min_of(block, q.tokens);
  for (int64_t i = q.tokens - num_rows; i < q.tokens; ++i) {
    const int64_t seen = causal ? k.tokens - q.tokens + i + 1 : k.tokens;
    const std::vector<double> logs = test::log_softmax(
        q, {batch, i, head}, k, head / (q.heads / k.heads), seen, static_cast<double>(kScale));
    for (int64_t j = 0; j < seen; ++j) {
      mass[static_cast<std::size_t>(j / block)] +=
          std::exp(logs[static_cast<std::size_t>(j)]) / static_cast<double>(num_rows);
    }
  }
  return mass;
}

// The budget reaches gamma and one block less does not, up to rounding in fp32.
void check_budgets(const Tensor& q, const Tensor& k, double gamma, int64_t block, bool causal) {
  const std::vector<int32_t> got = budgets(q, k, gamma, block, causal);
  for (int64_t b = 0; b < q.batch; ++b) {
    for (int64_t h = 0; h < q.heads; ++h) {
      std::vector<double> mass = block_mass(q, k, b, h, block, causal);
      std::sort(mass.begin(), mass.end(), std::greater<>());
      const int32_t budget = got[static_cast<std::size_t>(b * q.heads + h)];
      CHECK(budget >= 1 && budget <= static_cast<int32_t>(mass.size()));
      double reached = 0.0;
      for (int32_t i = 0; i < budget - 1; ++i) reached += mass[static_cast<std::size_t>(i)];
      CHECK(reached < gamma + 1e-6);
      reached += mass[static_cast<std::size_t>(budget) - 1];
      CHECK(reached > gamma - 1e-6);
    }
  }
}

TEST(budgets_reach_gamma_and_no_block_more) {
  test::for_each_family([] {
    for (const DType dtype : test::kAllDTypes) {
      const Tensor q = Tensor(dtype, 2, 70, 4, 64, 8).fill_normal(1);
      const Tensor k = Tensor(dtype, 2, 700, 2, 64).fill_normal(2);
      for (const double gamma : {0.1, 0.5, 0.9, 0.99}) check_budgets(q, k, gamma, 64, true);
    }
    for (const int64_t head_dim : {128, 256}) {
      const Tensor q = Tensor(DType::kFloat32, 1, 300, 2, head_dim).fill_normal(3, 0.7f);
      const Tensor k = Tensor(DType::kFloat32, 1, 300, 1, head_dim).fill_normal(4, 0.7f);
      check_budgets(q, k, 0.7, 128, true);
      check_budgets(q, k, 0.7, 64, false);
    }
    const Tensor one = Tensor(DType::kFloat32, 1, 1, 1, 64).fill_normal(5);
    const Tensor many = Tensor(DType::kFloat32, 1, 5000, 1, 64).fill_normal(6);
    check_budgets(one, many, 0.6, 64, true);
    check_budgets(many, one, 0.6, 64, false);
  });
}

// Keys that every query finds equal.
Tensor equal_keys(int64_t tokens) {
  Tensor k(DType::kFloat32, 1, tokens, 1, 64);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < 64; ++d) k.set(0, t, 0, d, 0.5f);
  }
  return k;
}

TEST(budgets_of_equal_keys_by_hand) {
  // Without causal masking every block of 64 holds a tenth.
  const Tensor q = Tensor(DType::kFloat32, 1, 64, 1, 64).fill_normal(1);
  const Tensor k = equal_keys(640);
  CHECK_EQ(budgets(q, k, 0.05, 64, false)[0], 1);
  CHECK_EQ(budgets(q, k, 0.25, 64, false)[0], 3);
  CHECK_EQ(budgets(q, k, 0.75, 64, false)[0], 8);
  CHECK_EQ(budgets(q, k, 0.95, 64, false)[0], 10);
}

TEST(gamma_at_its_ends) {
  const Tensor q = Tensor(DType::kFloat32, 2, 64, 2, 64).fill_normal(1);
  const Tensor k = Tensor(DType::kFloat32, 2, 640, 1, 64).fill_normal(2);
  CHECK(budgets(q, k, 1.0) == std::vector<int32_t>(4, 10));
  CHECK(budgets(q, k, 7.0) == std::vector<int32_t>(4, 10));
  CHECK(budgets(q, k, 0.0) == std::vector<int32_t>(4, 1));
  CHECK(budgets(q, k, -1.0) == std::vector<int32_t>(4, 1));
}

void check_shares(const Tensor& q, const Tensor& k, Forced f, int64_t block, bool causal) {
  const std::vector<float> got = shares(q, k, f, block, causal);
  // Positions of the last queries, and the local blocks as the definition puts it: from that of the
  // last of them down to that of the first, then as many more as make up the number.
  const int64_t first = k.tokens - min_of(block, q.tokens);
  const int64_t local_begin = causal && f.num_local > 0 ? first / block - f.num_local + 1 : kHuge;
  for (int64_t b = 0; b < q.batch; ++b) {
    for (int64_t h = 0; h < q.heads; ++h) {
      const std::vector<double> mass = block_mass(q, k, b, h, block, causal);
      double held = 0.0, total = 0.0;
      for (int64_t n = 0; n < static_cast<int64_t>(mass.size()); ++n) {
        const double a = mass[static_cast<std::size_t>(n)];
        total += a;
        if (n >= local_begin || n < f.num_sinks) held += a;
      }
      const float share = got[static_cast<std::size_t>(b * q.heads + h)];
      CHECK_NEAR(share, held / total, 1e-5);
      CHECK(share >= 0.0f && share <= 1.0f);
    }
  }
}

TEST(shares_are_those_of_the_forced_blocks) {
  test::for_each_family([] {
    for (const DType dtype : test::kAllDTypes) {
      const Tensor q = Tensor(dtype, 2, 70, 4, 64, 8).fill_normal(1);
      const Tensor k = Tensor(dtype, 2, 700, 2, 64).fill_normal(2);
      for (const Forced forced : {Forced{1, 1}, {0, 0}, {3, 0}, {0, 4}, {2, 3}}) {
        check_shares(q, k, forced, 64, true);
      }
      check_shares(q, k, {2, 1}, 128, false);
    }
    for (const int64_t head_dim : {128, 256}) {
      const Tensor q = Tensor(DType::kFloat32, 1, 300, 2, head_dim).fill_normal(3, 0.7f);
      const Tensor k = Tensor(DType::kFloat32, 1, 300, 1, head_dim).fill_normal(4, 0.7f);
      check_shares(q, k, {1, 1}, 128, true);
      check_shares(q, k, {1, 2}, 64, true);
    }
    const Tensor one = Tensor(DType::kFloat32, 1, 1, 1, 64).fill_normal(5);
    const Tensor many = Tensor(DType::kFloat32, 1, 5000, 1, 64).fill_normal(6);
    check_shares(one, many, {1, 1}, 64, true);
    check_shares(many, one, {1, 1}, 64, false);
  });
}

TEST(shares_of_equal_keys_by_hand) {
  const Tensor q = Tensor(DType::kFloat32, 1, 64, 1, 64).fill_normal(1);
  CHECK_NEAR(shares(q, equal_keys(640), {2, 5}, 64, false)[0], 0.2, 1e-6);  // none is local
  // Positions 96 to 159 begin inside block 1, so blocks 1 and 2 are local.
  double expected = 0.0;
  for (int64_t p = 96; p < 160; ++p) {
    expected += static_cast<double>(p + 1 - 64) / static_cast<double>(p + 1) / 64.0;
  }
  CHECK_NEAR(shares(q, equal_keys(160), {0, 1})[0], expected, 1e-6);
  CHECK_NEAR(shares(q, equal_keys(160), {1, 0})[0], 1.0 - expected, 1e-6);
  CHECK_EQ(shares(q, equal_keys(160), {0, 0})[0], 0.0f);
  // All of it is exactly one.
  CHECK_EQ(shares(q, equal_keys(160), {1, 1})[0], 1.0f);
  CHECK_EQ(shares(q, equal_keys(160), {0, 2})[0], 1.0f);
  CHECK_EQ(shares(q, equal_keys(640), {0, kHuge})[0], 1.0f);
  CHECK_EQ(shares(q, equal_keys(640), {kHuge, 0})[0], 1.0f);
}

TEST(nan_gives_all_blocks_and_a_nan_share) {
  test::for_each_family([] {
    const Tensor q = Tensor(DType::kFloat32, 1, 640, 2, 64).fill_normal(1);
    Tensor k = Tensor(DType::kFloat32, 1, 640, 2, 64).fill_normal(2);
    const std::vector<int32_t> before = budgets(q, k, 0.5);
    k.set(0, 600, 1, 3, kNan);
    const std::vector<int32_t> after = budgets(q, k, 0.5);
    CHECK_EQ(after[0], before[0]);  // the other kv head
    CHECK_EQ(after[1], 10);
    CHECK(!std::isnan(shares(q, k, {1, 1})[0]));
    CHECK(std::isnan(shares(q, k, {1, 1})[1]));
  });
}

TEST(threads_change_nothing) {
  test::for_each_family([] {
    const Tensor q = Tensor(DType::kBFloat16, 1, 128, 8, 128).fill_normal(1, 0.7f);
    const Tensor k = Tensor(DType::kBFloat16, 1, 6000, 2, 128).fill_normal(2, 0.7f);
    const std::vector<int32_t> expected = budgets(q, k, 0.9, 128);
    const std::vector<float> expected_shares = shares(q, k, {1, 1}, 128);
    test::for_some_thread_counts([&] {
      CHECK(budgets(q, k, 0.9, 128) == expected);
      CHECK(shares(q, k, {1, 1}, 128) == expected_shares);
    });
  });
}

TEST(empty_inputs) {
  const Tensor none(DType::kFloat32, 1, 0, 2, 64), some(DType::kFloat32, 1, 64, 2, 64);
  CHECK(budgets(none, some, 0.9) == std::vector<int32_t>(2, 0));
  CHECK(budgets(none, some, 1.0) == std::vector<int32_t>(2, 0));
  CHECK(budgets(some, none, 0.9, 64, false) == std::vector<int32_t>(2, 0));
  for (const float share : shares(none, some, {1, 1})) CHECK(std::isnan(share));
  for (const float share : shares(some, none, {1, 1}, 64, false)) CHECK(std::isnan(share));
  const Tensor no_batch(DType::kFloat32, 0, 64, 2, 64);
  CHECK(budgets(no_batch, no_batch, 0.9).empty());
  CHECK(shares(no_batch, no_batch, {1, 1}).empty());
}

TEST(rules) {
  const Tensor x = Tensor(DType::kFloat32, 1, 64, 2, 64).fill_normal(1);
  CHECK_THROWS(InvalidArgument, "estimate_budgets: gamma must be a number, got gamma=nan",
               budgets(x, x, static_cast<double>(kNan)));
  CHECK_THROWS(InvalidArgument,
               "estimate_budgets: block_size must be one of 64, 128, got "
               "block_size=32",
               budgets(x, x, 0.9, 32));
  CHECK_THROWS(InvalidArgument,
               "estimate_shares: num_sink_blocks must be at least 0, got num_sink_blocks=-1",
               shares(x, x, {-1, 0}));
  CHECK_THROWS(InvalidArgument,
               "estimate_shares: num_local_blocks must be at least 0, got num_local_blocks=-2",
               shares(x, x, {0, -2}));
  NeedParams p = params_of(x, x, 64, true);
  p.gamma = 0.9;
  for (const BudgetMode mode : {BudgetMode::kLastBlock, BudgetMode::kTopP}) {
    p.mode = mode;
    const std::string op = mode == BudgetMode::kTopP ? "estimate_shares" : "estimate_budgets";
    const int64_t needed = cpu::estimate_needs_workspace_bytes(p);
    CHECK_THROWS(InvalidArgument,
                 op + ": workspace must hold " + std::to_string(needed) + " bytes, got 0",
                 cpu::estimate_needs(p));
  }
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
