// Scoring is a matrix product of the proxy heads and the softmax statistics of each of its rows. Of
// proxies that outnumber the kv heads several share one of the keys.
#include "checks.h"
#include "problem.h"

namespace {

using namespace proxyattn::bench;

// Pairs of sampled tokens of which the query sees the key.
double visible_pairs(const Problem& p) {
  const auto length = static_cast<double>(p.proxy_length());
  return p.causal ? length * (length + 1) / 2 : length * length;
}

Workload prepare(Machine& machine, const Case& one) {
  const Problem problem = problem_of(one);
  const bool with_mass = one.integer("mass") != 0;
  const auto q_proxy = random_buffer(machine, problem.q_proxy_elements(), problem.dtype, 1);
  const auto k_proxy = random_buffer(machine, problem.k_proxy_elements(), problem.dtype, 2);
  const int64_t score_bytes = problem.cells() * int64_t{sizeof(float)};
  const auto peak = empty_buffer(machine, score_bytes);
  const auto mass = empty_buffer(machine, with_mass ? score_bytes : 0);

  proxyattn::ScoreParams params = score_params(problem);
  params.q_proxy = q_proxy->data();
  params.k_proxy = k_proxy->data();
  params.peak = peak->as<float>();
  params.mass = mass->as<float>();
  params.workspace_bytes = machine.stages().score_blocks_workspace_bytes(params);
  const auto workspace = empty_buffer(machine, params.workspace_bytes);
  params.workspace = workspace->data();

  Workload work;
  work.launch = [&machine, params, q_proxy, k_proxy, peak, mass, workspace] {
    machine.stages().score_blocks(params, machine.stream());
  };
  work.check = [&machine, params] { check_score(machine, params); };
  const auto heads = static_cast<double>(problem.batch * problem.proxy_heads);
  work.flops = 2.0 * heads * static_cast<double>(problem.head_dim) * visible_pairs(problem);
  return work;
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(argc, argv,
                       {"score",
                        {{"length", {"4096"}, {"32768", "131072"}},
                         {"proxy_heads", {"2", "4"}, {"1", "8"}},
                         {"kv_heads", {"2"}, {"8"}},
                         {"mass", {"0", "1"}, {"0", "1"}},
                         axis("head_dim", {"128"}),
                         axis("stride", {"4"}),
                         {"block_size", {"128"}, {"64", "128"}},
                         axis("causal", {"1"}),
                         axis("batch", {"1"}),
                         axis("dtype", {"bf16"})},
                        prepare});
}
