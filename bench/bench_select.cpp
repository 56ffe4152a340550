// Selection sorts each row of scores and counts how much of the ranking each head takes.
#include <cmath>

#include "checks.h"
#include "problem.h"

namespace {

using namespace proxyattn::bench;

// Scores as the scoring stage leaves them: log-probabilities where a block is visible, -inf and no
// mass elsewhere, masses that sum to 1 over a row.
struct Scores {
  std::vector<float> peak;
  std::vector<float> mass;
};

Scores scores_of(Machine& machine, const Problem& problem) {
  const auto normal = random_buffer(machine, problem.cells(), proxyattn::DType::kFloat32, 3);
  Scores scores{download(machine, normal->as<float>(), problem.cells()), {}};
  scores.mass.resize(scores.peak.size());
  const auto width = static_cast<std::size_t>(problem.num_blocks());
  for (std::size_t row = 0; row < scores.peak.size() / width; ++row) {
    const int64_t m = static_cast<int64_t>(row) % problem.num_blocks();
    const auto visible = static_cast<std::size_t>(problem.grid().visible(m));
    float* const peak = scores.peak.data() + row * width;
    float* const mass = scores.mass.data() + row * width;
    float sum = 0.0f;
    for (std::size_t n = 0; n < visible; ++n) sum += std::exp(2.0f * peak[n]);
    for (std::size_t n = 0; n < visible; ++n) mass[n] = std::exp(2.0f * peak[n]) / sum;
    for (std::size_t n = visible; n < width; ++n) {
      peak[n] = -INFINITY;
      mass[n] = 0.0f;
    }
    for (std::size_t n = 0; n < visible; ++n) peak[n] = 2.0f * peak[n] - 12.0f;
  }
  return scores;
}

// What the heads of a list need differs: from a twentieth to the half of all blocks, shares from 0
// up to .9.
std::vector<int32_t> budgets_of(const Problem& problem) {
  std::vector<int32_t> budgets;
  for (int64_t h = 0; h < problem.batch * problem.q_heads; ++h) {
    budgets.push_back(static_cast<int32_t>(problem.num_blocks() * (1 + h % 10) / 20 + 1));
  }
  return budgets;
}
std::vector<float> shares_of(const Problem& problem) {
  std::vector<float> shares;
  for (int64_t h = 0; h < problem.batch * problem.q_heads; ++h) {
    shares.push_back(0.1f * static_cast<float>(h % 10));
  }
  return shares;
}

Workload prepare(Machine& machine, const Case& one) {
  const Problem problem = problem_of(one);
  const Scores scores = scores_of(machine, problem);
  const auto peak = uploaded(machine, scores.peak);
  const auto mass = uploaded(machine, scores.mass);
  const auto budgets = uploaded(machine, budgets_of(problem));
  const auto shares = uploaded(machine, shares_of(problem));
  const auto indices = empty_buffer(machine, problem.cells() * int64_t{sizeof(int32_t)});
  const int64_t counts_bytes =
      problem.batch * problem.q_heads * problem.num_blocks() * int64_t{sizeof(int32_t)};
  const auto counts = empty_buffer(machine, counts_bytes);

  proxyattn::SelectParams params = select_params(problem);
  params.budget_mode = budget_mode_of(one.text("mode"));
  const bool top_p = params.budget_mode == proxyattn::BudgetMode::kTopP;
  params.gamma = one.number("gamma");
  params.min_budget = top_p ? 512 : 2048;
  params.peak = peak->as<float>();
  params.mass = top_p ? mass->as<float>() : nullptr;
  params.budgets = top_p ? nullptr : budgets->as<int32_t>();
  params.shares = top_p ? shares->as<float>() : nullptr;
  params.indices = indices->as<int32_t>();
  params.counts = counts->as<int32_t>();

  Workload work;
  work.launch = [&machine, params, peak, mass, budgets, shares, indices, counts] {
    machine.stages().select_blocks(params, machine.stream());
  };
  work.check = [&machine, params] { check_select(machine, params); };
  const int64_t visible = problem.batch * problem.proxy_heads * problem.visible_blocks();
  const int64_t bytes = 4 * visible * (top_p ? 2 : 1) + 4 * problem.cells() + counts_bytes;
  work.bytes = static_cast<double>(bytes);
  return work;
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(argc, argv,
                       {"select",
                        {{"length", {"16384"}, {"32768", "131072"}},
                         {"q_heads", {"8"}, {"32"}},
                         {"proxy_heads", {"2"}, {"1", "8"}},
                         axis("mode", {"top_p", "last_block"}),
                         axis("gamma", {"0.9"}),
                         {"block_size", {"128"}, {"64", "128"}},
                         axis("causal", {"1"}),
                         axis("batch", {"1"})},
                        prepare});
}
