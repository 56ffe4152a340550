// estimate_budgets on the CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "proxyattn/needs.h"
#include "proxyattn/error.h"

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

NeedParams params_of(const Tensor& q, const Tensor& k, double gamma, int64_t block, bool causal) {
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
  p.gamma = gamma;
  p.scale = kScale;
  p.causal = causal;
  p.dtype = q.dtype;
  return p;
}

std::vector<int32_t> budgets(
    const Tensor& q, const Tensor& k, double gamma, int64_t block = 64, bool causal = true) {
  NeedParams p = params_of(q, k, gamma, block, causal);
  std::vector<int32_t> out(static_cast<std::size_t>(q.batch * q.heads), -7);
  p.budgets = out.data();
  const test::Workspace workspace(p, cpu::estimate_needs_workspace_bytes(p));
  cpu::estimate_needs(p);
  return out;
}

// Mass of each key block in the last queries of a head, largest first.
std::vector<double> sorted_mass(
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
  std::sort(mass.begin(), mass.end(), std::greater<>());
  return mass;
}

// The budget reaches gamma and one block less does not, up to rounding in fp32.
void check_budgets(const Tensor& q, const Tensor& k, double gamma, int64_t block, bool causal) {
  const std::vector<int32_t> got = budgets(q, k, gamma, block, causal);
  for (int64_t b = 0; b < q.batch; ++b) {
    for (int64_t h = 0; h < q.heads; ++h) {
      const std::vector<double> mass = sorted_mass(q, k, b, h, block, causal);
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

TEST(equal_keys_by_hand) {
  // Without causal masking and with equal keys every block of 64 holds a tenth.
  const Tensor q = Tensor(DType::kFloat32, 1, 64, 1, 64).fill_normal(1);
  Tensor k(DType::kFloat32, 1, 640, 1, 64);
  for (int64_t t = 0; t < 640; ++t) {
    for (int64_t d = 0; d < 64; ++d) k.set(0, t, 0, d, 0.5f);
  }
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

TEST(nan_gives_all_blocks) {
  test::for_each_family([] {
    const Tensor q = Tensor(DType::kFloat32, 1, 640, 2, 64).fill_normal(1);
    Tensor k = Tensor(DType::kFloat32, 1, 640, 2, 64).fill_normal(2);
    const std::vector<int32_t> before = budgets(q, k, 0.5);
    k.set(0, 600, 1, 3, kNan);
    const std::vector<int32_t> after = budgets(q, k, 0.5);
    CHECK_EQ(after[0], before[0]);  // the other kv head
    CHECK_EQ(after[1], 10);
  });
}

TEST(threads_change_nothing) {
  test::for_each_family([] {
    const Tensor q = Tensor(DType::kBFloat16, 1, 128, 8, 128).fill_normal(1, 0.7f);
    const Tensor k = Tensor(DType::kBFloat16, 1, 6000, 2, 128).fill_normal(2, 0.7f);
    const std::vector<int32_t> expected = budgets(q, k, 0.9, 128);
    test::for_some_thread_counts([&] { CHECK(budgets(q, k, 0.9, 128) == expected); });
  });
}

TEST(empty_inputs) {
  const Tensor none(DType::kFloat32, 1, 0, 2, 64), some(DType::kFloat32, 1, 64, 2, 64);
  CHECK(budgets(none, some, 0.9) == std::vector<int32_t>(2, 0));
  CHECK(budgets(none, some, 1.0) == std::vector<int32_t>(2, 0));
  CHECK(budgets(some, none, 0.9, 64, false) == std::vector<int32_t>(2, 0));
  const Tensor no_batch(DType::kFloat32, 0, 64, 2, 64);
  CHECK(budgets(no_batch, no_batch, 0.9).empty());
}

TEST(rules) {
  const Tensor x = Tensor(DType::kFloat32, 1, 64, 2, 64).fill_normal(1);
  CHECK_THROWS(InvalidArgument, "estimate_budgets: gamma must be a number, got gamma=nan",
               budgets(x, x, static_cast<double>(kNan)));
  CHECK_THROWS(InvalidArgument,
               "estimate_budgets: block_size must be one of 64, 128, got "
               "block_size=32",
               budgets(x, x, 0.9, 32));
  NeedParams p = params_of(x, x, 0.9, 64, true);
  const int64_t needed = cpu::estimate_needs_workspace_bytes(p);
  CHECK_THROWS(InvalidArgument,
               "estimate_budgets: workspace must hold " + std::to_string(needed) + " bytes, got 0",
               cpu::estimate_needs(p));
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
