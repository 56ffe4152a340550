// What heads need takes the exact attention of the last queries: one read of all keys.
#include <algorithm>

#include "checks.h"
#include "problem.h"

namespace {

using namespace proxyattn::bench;

Workload prepare(Machine& machine, const Case& one) {
  const Problem problem = problem_of(one);
  const auto q = random_buffer(machine, problem.q_elements(), problem.dtype, 1);
  const auto k = random_buffer(machine, problem.kv_elements(), problem.dtype, 2);
  const int64_t heads = problem.batch * problem.q_heads;
  // Budgets or shares: both take as much.
  const auto needs = empty_buffer(machine, heads * int64_t{sizeof(int32_t)});

  proxyattn::NeedParams params = need_params(problem);
  params.mode = budget_mode_of(one.text("mode"));
  params.gamma = one.number("gamma");
  params.q = q->data();
  params.k = k->data();
  const bool top_p = params.mode == proxyattn::BudgetMode::kTopP;
  params.budgets = top_p ? nullptr : needs->as<int32_t>();
  params.shares = top_p ? needs->as<float>() : nullptr;
  params.workspace_bytes = machine.stages().estimate_needs_workspace_bytes(params);
  const auto workspace = empty_buffer(machine, params.workspace_bytes);
  params.workspace = workspace->data();

  Workload work;
  work.launch = [&machine, params, q, k, needs, workspace] {
    machine.stages().estimate_needs(params, machine.stream());
  };
  work.check = [&machine, params] { check_needs(machine, params); };
  const int64_t rows = heads * std::min(problem.block_size, problem.length);
  work.flops =
      2.0 * static_cast<double>(rows) * static_cast<double>(problem.length * problem.head_dim);
  work.bytes = static_cast<double>(problem.kv_elements() * element_bytes(problem.dtype));
  return work;
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(argc, argv,
                       {"needs",
                        {{"length", {"4096"}, {"32768", "131072"}},
                         {"q_heads", {"8"}, {"32"}},
                         {"kv_heads", {"2"}, {"8"}},
                         axis("head_dim", {"128"}),
                         {"block_size", {"128"}, {"64", "128"}},
                         axis("mode", {"top_p", "last_block"}),
                         axis("gamma", {"0.95"}),
                         axis("causal", {"1"}),
                         axis("batch", {"1"}),
                         axis("dtype", {"bf16"})},
                        prepare});
}
