// The whole of proxy_attention, and its estimation alone: pooling, budgets, scores, selection.
//
// gamma is 0, so that every head's budget is one block and the minimum budget sets how much is
// read: the least that makes the wanted density. TFLOPS count the attention's executed blocks.
#include <numeric>

#include "proxyattn/error.h"

#include "checks.h"
#include "problem.h"

namespace {

using namespace proxyattn;
using namespace proxyattn::bench;

BudgetMode mode_of(const std::string& name) {
  if (name == "coverage") return BudgetMode::kTopP;
  PROXYATTN_CHECK(name == "last_block", "bench: mode must be last_block or coverage, got ", name);
  return BudgetMode::kLastBlock;
}

struct Inputs {
  std::shared_ptr<Buffer> q;
  std::shared_ptr<Buffer> k;
  std::shared_ptr<Buffer> v;
};

// The stages before attention, each with its own buffers.
class Estimation {
 public:
  Estimation(Machine& machine,
             const Problem& problem,
             const Inputs& inputs,
             BudgetMode mode,
             int64_t min_budget);

  void launch() const {
    const Stages& stages = machine_.stages();
    stages.pool_heads(pool_, machine_.stream());
    stages.estimate_needs(budget_, machine_.stream());
    stages.score_blocks(score_, machine_.stream());
    stages.select_blocks(select_, machine_.stream());
  }

  void check() const {
    check_pool(machine_, pool_);
    check_needs(machine_, budget_);
    check_score(machine_, score_);
    check_select(machine_, select_);
  }

  const int32_t* indices() const { return select_.indices; }
  const int32_t* counts() const { return select_.counts; }
  int64_t num_chosen(const Problem& problem) const {
    const int64_t size = problem.batch * problem.q_heads * problem.num_blocks();
    const std::vector<int32_t> counts = download<int32_t>(machine_, select_.counts, size);
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
  }

 private:
  void* take(int64_t bytes) {
    buffers_.push_back(empty_buffer(machine_, bytes));
    return buffers_.back()->data();
  }

  Machine& machine_;
  Inputs inputs_;
  std::vector<std::shared_ptr<Buffer>> buffers_;
  PoolParams pool_;
  NeedParams budget_;
  ScoreParams score_;
  SelectParams select_;
};

Estimation::Estimation(Machine& machine,
                       const Problem& problem,
                       const Inputs& inputs,
                       BudgetMode mode,
                       int64_t min_budget)
    : machine_(machine),
      inputs_(inputs),
      pool_(pool_params(problem)),
      budget_(need_params(problem)),
      score_(score_params(problem)),
      select_(select_params(problem)) {
  const bool coverage = mode == BudgetMode::kTopP;
  const int64_t heads = problem.batch * problem.q_heads;
  pool_.q = inputs.q->data();
  pool_.k = inputs.k->data();
  pool_.q_proxy = take(problem.proxy_elements() * element_bytes(problem.dtype));
  pool_.k_proxy = take(problem.proxy_elements() * element_bytes(problem.dtype));

  budget_.gamma = 0.0;
  budget_.q = inputs.q->data();
  budget_.k = inputs.k->data();
  budget_.budgets = static_cast<int32_t*>(take(heads * int64_t{sizeof(int32_t)}));
  budget_.workspace_bytes = machine.stages().estimate_needs_workspace_bytes(budget_);
  budget_.workspace = take(budget_.workspace_bytes);

  score_.q_proxy = pool_.q_proxy;
  score_.k_proxy = pool_.k_proxy;
  score_.peak = static_cast<float*>(take(problem.cells() * int64_t{sizeof(float)}));
  score_.mass = static_cast<float*>(take(coverage ? problem.cells() * int64_t{sizeof(float)} : 0));
  score_.workspace_bytes = machine.stages().score_blocks_workspace_bytes(score_);
  score_.workspace = take(score_.workspace_bytes);

  select_.budget_mode = mode;
  select_.min_budget = min_budget;
  select_.peak = score_.peak;
  select_.mass = score_.mass;
  select_.budgets = budget_.budgets;
  select_.indices = static_cast<int32_t*>(take(problem.cells() * int64_t{sizeof(int32_t)}));
  select_.counts =
      static_cast<int32_t*>(take(heads * problem.num_blocks() * int64_t{sizeof(int32_t)}));
  select_.shares = static_cast<double*>(take(coverage ? heads * int64_t{sizeof(double)} : 0));
}

// The pipeline must give what attention over the separate stages' lists gives.
void check_pipeline(Machine& machine,
                    const Problem& problem,
                    const PipelineParams& pipeline,
                    const Estimation& estimation) {
  estimation.launch();
  machine.synchronize();
  estimation.check();
  AttentionParams params = attention_params(problem);
  params.q = pipeline.q;
  params.k = pipeline.k;
  params.v = pipeline.v;
  params.out = pipeline.out;
  params.indices = estimation.indices();
  params.counts = estimation.counts();
  check_attention(machine, params);
}

Workload whole(Machine& machine,
               const Problem& problem,
               const Inputs& inputs,
               PipelineParams params,
               const std::shared_ptr<Estimation>& estimation) {
  const auto out = empty_buffer(machine, problem.q_elements() * element_bytes(problem.dtype));
  params.q = inputs.q->data();
  params.k = inputs.k->data();
  params.v = inputs.v->data();
  params.out = out->data();
  params.workspace_bytes = machine.stages().proxy_attention_workspace_bytes(params);
  const auto workspace = empty_buffer(machine, params.workspace_bytes);
  params.workspace = workspace->data();

  Workload work;
  work.launch = [&machine, params, inputs, out, workspace] {
    machine.stages().proxy_attention(params, machine.stream());
  };
  work.check = [&machine, problem, params, estimation] {
    check_pipeline(machine, problem, params, *estimation);
  };
  estimation->launch();
  machine.synchronize();
  work.flops = problem.block_flops(estimation->num_chosen(problem));
  return work;
}

Workload prepare(Machine& machine, const Case& one) {
  const Problem problem = problem_of(one);
  const Inputs inputs = {random_buffer(machine, problem.q_elements(), problem.dtype, 1),
                         random_buffer(machine, problem.kv_elements(), problem.dtype, 2),
                         random_buffer(machine, problem.kv_elements(), problem.dtype, 3)};
  PipelineParams params = pipeline_params(problem);
  params.gamma = 0.0;
  params.budget_mode = mode_of(one.text("mode"));
  params.min_budget =
      blocks_for_density(problem.grid(), one.number("density")) * problem.block_size;
  const auto estimation =
      std::make_shared<Estimation>(machine, problem, inputs, params.budget_mode, params.min_budget);
  const std::string part = one.text("part");
  if (part == "whole") return whole(machine, problem, inputs, params, estimation);
  PROXYATTN_CHECK(part == "estimation", "bench: part must be whole or estimation, got ", part);
  Workload work;
  work.launch = [estimation] { estimation->launch(); };
  work.check = [estimation] { estimation->check(); };
  return work;
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(argc, argv,
                       {"pipeline",
                        {{"length", {"4096"}, {"32768", "131072"}},
                         axis("part", {"whole", "estimation"}),
                         axis("mode", {"last_block", "coverage"}),
                         axis("density", {"0.1"}),
                         {"q_heads", {"8"}, {"32"}},
                         {"kv_heads", {"2"}, {"8"}},
                         {"proxy_heads", {"2"}, {"1", "8"}},
                         axis("head_dim", {"128"}),
                         axis("stride", {"4"}),
                         axis("block_size", {"128"}),
                         axis("batch", {"1"}),
                         axis("dtype", {"bf16"})},
                        prepare});
}
