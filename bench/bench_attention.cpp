// Attention over block lists. TFLOPS count the whole blocks that were executed; all blocks are
// also counted as dense attention is. PROXYATTN_FAMILY=<family> in the environment picks another
// kernel family than the best.
#include "proxyattn/error.h"

#include "checks.h"
#include "lists.h"
#include "problem.h"

namespace {

using namespace proxyattn::bench;

Workload prepare(Machine& machine, const Case& one) {
  const Problem problem = problem_of(one);
  PROXYATTN_CHECK(problem.window == 0 || one.text("lists") == "all",
                  "bench: window must be 0 unless lists is all, got ", one.name());
  const BlockLists lists = make_lists(problem, one.text("lists"));
  const auto q = random_buffer(machine, problem.q_elements(), problem.dtype, 1);
  const auto k = random_buffer(machine, problem.kv_elements(), problem.dtype, 2);
  const auto v = random_buffer(machine, problem.kv_elements(), problem.dtype, 3);
  const int64_t out_bytes = problem.q_elements() * element_bytes(problem.dtype);
  const auto out = empty_buffer(machine, out_bytes);
  const auto indices = uploaded(machine, lists.indices);
  const auto counts = uploaded(machine, lists.counts);

  proxyattn::AttentionParams params = attention_params(problem);
  params.list_heads = lists.list_heads;
  params.q = q->data();
  params.k = k->data();
  params.v = v->data();
  params.indices = indices->as<int32_t>();
  params.counts = counts->as<int32_t>();
  params.out = out->data();
  params.workspace_bytes = machine.stages().block_sparse_attention_workspace_bytes(params);
  const auto workspace = empty_buffer(machine, params.workspace_bytes);
  params.workspace = workspace->data();

  Workload work;
  work.launch = [&machine, params, q, k, v, out, indices, counts, workspace] {
    machine.stages().block_sparse_attention(params, machine.stream());
  };
  work.check = [&machine, params] { check_attention(machine, params); };
  work.flops = problem.block_flops(lists.num_executed);
  // Of a window the blocks that it touches are all there is to count.
  const bool is_dense = lists.indices.empty() && problem.window == 0;
  work.dense_flops = is_dense ? problem.dense_flops() : 0;
  return work;
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(argc, argv,
                       {"attention",
                        {{"length", {"2048"}, {"8192", "32768", "131072"}},
                         {"lists",
                          {"all", "random:0.2", "nested:0.2"},
                          {"all", "random:0.2", "random:0.05", "nested:0.2", "nested:0.05"}},
                         {"q_heads", {"8"}, {"32"}},
                         {"kv_heads", {"2"}, {"8"}},
                         axis("head_dim", {"128"}),
                         axis("block_size", {"128", "64"}),
                         axis("causal", {"1"}),
                         axis("window", {"0"}),
                         axis("batch", {"1"}),
                         {"dtype", {"bf16", "fp32"}, {"bf16"}}},
                        prepare});
}
