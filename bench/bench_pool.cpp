// Pooling reads every token once, or the first of each window, and writes the means: memory bound.
#include "checks.h"
#include "problem.h"

namespace {

using namespace proxyattn::bench;

double bytes_of(const Problem& p) {
  const int64_t tokens = p.pooling == proxyattn::Pooling::kMean ? p.length : p.proxy_length();
  const int64_t read = p.batch * tokens * (p.q_heads + p.kv_heads) * p.head_dim;
  const int64_t written = p.q_proxy_elements() + p.k_proxy_elements();
  return static_cast<double>((read + written) * element_bytes(p.dtype));
}

Workload prepare(Machine& machine, const Case& one) {
  const Problem problem = problem_of(one);
  const auto q = random_buffer(machine, problem.q_elements(), problem.dtype, 1);
  const auto k = random_buffer(machine, problem.kv_elements(), problem.dtype, 2);
  const int64_t size = element_bytes(problem.dtype);
  const auto q_proxy = empty_buffer(machine, problem.q_proxy_elements() * size);
  const auto k_proxy = empty_buffer(machine, problem.k_proxy_elements() * size);

  proxyattn::PoolParams params = pool_params(problem);
  params.q = q->data();
  params.k = k->data();
  params.q_proxy = q_proxy->data();
  params.k_proxy = k_proxy->data();

  Workload work;
  work.launch = [&machine, params, q, k, q_proxy, k_proxy] {
    machine.stages().pool_heads(params, machine.stream());
  };
  work.check = [&machine, params] { check_pool(machine, params); };
  work.bytes = bytes_of(problem);
  return work;
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(argc, argv,
                       {"pool",
                        {{"length", {"8192"}, {"32768", "131072"}},
                         {"q_heads", {"8"}, {"32"}},
                         {"kv_heads", {"2"}, {"8"}},
                         {"proxy_heads", {"2"}, {"1", "8"}},
                         axis("head_dim", {"128"}),
                         axis("stride", {"4"}),
                         axis("pooling", {"mean", "first"}),
                         axis("batch", {"1"}),
                         axis("dtype", {"bf16"})},
                        prepare});
}
