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

Workload prepare(Machine& machine, const Case& one) {
  const Problem problem = problem_of(one);
  const bool coverage = one.text("mode") == "coverage";
  const Scores scores = scores_of(machine, problem);
  const auto peak = uploaded(machine, scores.peak);
  const auto mass = uploaded(machine, scores.mass);
  const int64_t heads = problem.batch * problem.q_heads;
  // Heads that need from a twentieth to the half of all blocks.
  std::vector<int32_t> wanted(static_cast<std::size_t>(heads));
  for (std::size_t h = 0; h < wanted.size(); ++h) {
    const int64_t tenths_of_half = 1 + static_cast<int64_t>(h) % 10;
    wanted[h] = static_cast<int32_t>(problem.num_blocks() * tenths_of_half / 20 + 1);
  }
  const auto budgets = uploaded(machine, wanted);
  const auto indices = empty_buffer(machine, problem.cells() * int64_t{sizeof(int32_t)});
  const int64_t counts_bytes = heads * problem.num_blocks() * int64_t{sizeof(int32_t)};
  const auto counts = empty_buffer(machine, counts_bytes);
  const auto shares = empty_buffer(machine, heads * int64_t{sizeof(double)});

  proxyattn::SelectParams params = select_params(problem);
  params.budget_mode =
      coverage ? proxyattn::BudgetMode::kTopP : proxyattn::BudgetMode::kLastBlock;
  params.min_budget = coverage ? 1024 : 2048;
  params.peak = peak->as<float>();
  params.mass = coverage ? mass->as<float>() : nullptr;
  params.budgets = budgets->as<int32_t>();
  params.indices = indices->as<int32_t>();
  params.counts = counts->as<int32_t>();
  params.shares = coverage ? shares->as<double>() : nullptr;

  Workload work;
  work.launch = [&machine, params, peak, mass, budgets, indices, counts, shares] {
    machine.stages().select_blocks(params, machine.stream());
  };
  work.check = [&machine, params] { check_select(machine, params); };
  const int64_t visible = problem.batch * problem.proxy_heads * problem.visible_blocks();
  const int64_t bytes = 4 * visible * (coverage ? 2 : 1) + 4 * problem.cells() + counts_bytes;
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
                         {"mode", {"last_block", "coverage"}, {"last_block", "coverage"}},
                         {"block_size", {"128"}, {"64", "128"}},
                         axis("causal", {"1"}),
                         axis("batch", {"1"})},
                        prepare});
}
