// The whole of proxy_attention, and choose_blocks, its estimation alone.
//
// gamma is so small that every head needs little more than the forced blocks, though that has to be
// found out, and the minimum budget sets how much is read: the least that makes the wanted density.
// TFLOPS count the attention's executed blocks.
#include <numeric>

#include "proxyattn/error.h"

#include "checks.h"
#include "problem.h"

namespace {

using namespace proxyattn;
using namespace proxyattn::bench;

struct Inputs {
  std::shared_ptr<Buffer> q;
  std::shared_ptr<Buffer> k;
  std::shared_ptr<Buffer> v;
};

// The lists that choose_blocks leaves.
struct Lists {
  std::shared_ptr<Buffer> indices;
  std::shared_ptr<Buffer> counts;

  Lists(Machine& machine, const Problem& problem)
      : indices(empty_buffer(machine, problem.cells() * int64_t{sizeof(int32_t)})),
        counts(empty_buffer(
            machine,
            problem.batch * problem.q_heads * problem.num_blocks() * int64_t{sizeof(int32_t)})) {}
};

// The stages before attention by one call each: what both ops are held against.
class Estimation {
 public:
  Estimation(Machine& machine, const Problem& problem, const PipelineParams& pipeline);

  void launch() const {
    const Stages& stages = machine_.stages();
    stages.pool_heads(pool_, machine_.stream());
    stages.estimate_needs(need_, machine_.stream());
    stages.score_blocks(score_, machine_.stream());
    stages.select_blocks(select_, machine_.stream());
    machine_.synchronize();
  }

  // The stages, and the lists of another call.
  void check(const Lists& lists) const {
    check_pool(machine_, pool_);
    check_needs(machine_, need_);
    check_score(machine_, score_);
    SelectParams select = select_;
    select.indices = lists.indices->as<int32_t>();
    select.counts = lists.counts->as<int32_t>();
    check_select(machine_, select);
  }

  const Lists& lists() const { return lists_; }

 private:
  template <typename T>
  T* take(int64_t count) {
    buffers_.push_back(empty_buffer(machine_, count * static_cast<int64_t>(sizeof(T))));
    return buffers_.back()->as<T>();
  }

  Machine& machine_;
  Lists lists_;
  std::vector<std::shared_ptr<Buffer>> buffers_;
  PoolParams pool_;
  NeedParams need_;
  ScoreParams score_;
  SelectParams select_;
};

Estimation::Estimation(Machine& machine, const Problem& problem, const PipelineParams& pipeline)
    : machine_(machine),
      lists_(machine, problem),
      pool_(pool_params(problem)),
      need_(need_params(problem)),
      score_(score_params(problem)),
      select_(select_params(problem)) {
  const bool top_p = pipeline.budget_mode == BudgetMode::kTopP;
  const int64_t heads = problem.batch * problem.q_heads;
  pool_.q = pipeline.q;
  pool_.k = pipeline.k;
  pool_.q_proxy = take<std::byte>(problem.q_proxy_elements() * element_bytes(problem.dtype));
  pool_.k_proxy = take<std::byte>(problem.k_proxy_elements() * element_bytes(problem.dtype));

  need_.mode = pipeline.budget_mode;
  need_.gamma = pipeline.gamma;
  need_.q = pipeline.q;
  need_.k = pipeline.k;
  need_.budgets = top_p ? nullptr : take<int32_t>(heads);
  need_.shares = top_p ? take<float>(heads) : nullptr;
  need_.workspace_bytes = machine.stages().estimate_needs_workspace_bytes(need_);
  need_.workspace = take<std::byte>(need_.workspace_bytes);

  score_.q_proxy = pool_.q_proxy;
  score_.k_proxy = pool_.k_proxy;
  score_.peak = take<float>(problem.cells());
  score_.mass = top_p ? take<float>(problem.cells()) : nullptr;
  score_.workspace_bytes = machine.stages().score_blocks_workspace_bytes(score_);
  score_.workspace = take<std::byte>(score_.workspace_bytes);

  select_.budget_mode = pipeline.budget_mode;
  select_.gamma = pipeline.gamma;
  select_.min_budget = pipeline.min_budget;
  select_.peak = score_.peak;
  select_.mass = score_.mass;
  select_.budgets = need_.budgets;
  select_.shares = need_.shares;
  select_.indices = lists_.indices->as<int32_t>();
  select_.counts = lists_.counts->as<int32_t>();
}

// proxy_attention must give what attention over the separate stages' lists gives.
void check_whole(Machine& machine,
                 const Problem& problem,
                 const PipelineParams& pipeline,
                 const Estimation& estimation) {
  estimation.launch();
  estimation.check(estimation.lists());
  AttentionParams params = attention_params(problem);
  params.q = pipeline.q;
  params.k = pipeline.k;
  params.v = pipeline.v;
  params.out = pipeline.out;
  params.indices = estimation.lists().indices->as<int32_t>();
  params.counts = estimation.lists().counts->as<int32_t>();
  check_attention(machine, params);
}

int64_t num_chosen(Machine& machine, const Problem& problem, const Lists& lists) {
  const int64_t size = problem.batch * problem.q_heads * problem.num_blocks();
  const auto counts = download(machine, lists.counts->as<int32_t>(), size);
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

Workload whole(Machine& machine,
               const Problem& problem,
               const Inputs& inputs,
               PipelineParams params,
               const std::shared_ptr<Estimation>& estimation) {
  const auto out = empty_buffer(machine, problem.q_elements() * element_bytes(problem.dtype));
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
    check_whole(machine, problem, params, *estimation);
  };
  estimation->launch();
  work.flops = problem.block_flops(num_chosen(machine, problem, estimation->lists()));
  return work;
}

// From q and k to ready lists.
Workload estimation_alone(Machine& machine,
                          const Problem& problem,
                          const Inputs& inputs,
                          PipelineParams params,
                          const std::shared_ptr<Estimation>& estimation) {
  const Lists lists(machine, problem);
  params.indices = lists.indices->as<int32_t>();
  params.counts = lists.counts->as<int32_t>();
  params.workspace_bytes = machine.stages().choose_blocks_workspace_bytes(params);
  const auto workspace = empty_buffer(machine, params.workspace_bytes);
  params.workspace = workspace->data();

  Workload work;
  work.launch = [&machine, params, inputs, lists, workspace] {
    machine.stages().choose_blocks(params, machine.stream());
  };
  work.check = [estimation, lists] {
    estimation->launch();
    estimation->check(lists);
  };
  return work;
}

Workload prepare(Machine& machine, const Case& one) {
  const Problem problem = problem_of(one);
  const Inputs inputs = {random_buffer(machine, problem.q_elements(), problem.dtype, 1),
                         random_buffer(machine, problem.kv_elements(), problem.dtype, 2),
                         random_buffer(machine, problem.kv_elements(), problem.dtype, 3)};
  PipelineParams params = pipeline_params(problem);
  params.q = inputs.q->data();
  params.k = inputs.k->data();
  params.gamma = one.number("gamma");
  params.budget_mode = budget_mode_of(one.text("mode"));
  params.min_budget =
      blocks_for_density(problem.grid(), one.number("density")) * problem.block_size;
  const auto estimation = std::make_shared<Estimation>(machine, problem, params);
  const std::string part = one.text("part");
  if (part == "whole") return whole(machine, problem, inputs, params, estimation);
  PROXYATTN_CHECK(part == "estimation", "bench: part must be whole or estimation, got ", part);
  return estimation_alone(machine, problem, inputs, params, estimation);
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(argc, argv,
                       {"pipeline",
                        {{"length", {"4096"}, {"32768", "131072"}},
                         axis("part", {"whole", "estimation"}),
                         axis("mode", {"top_p", "last_block"}),
                         axis("density", {"0.1"}),
                         axis("gamma", {"0.001"}),
                         {"q_heads", {"8"}, {"32"}},
                         {"kv_heads", {"2"}, {"8"}},
                         {"proxy_heads", {"2"}, {"1", "8"}},
                         axis("head_dim", {"128"}),
                         axis("stride", {"4"}),
                         axis("pooling", {"mean"}),
                         {"block_size", {"128"}, {"64", "128"}},
                         axis("batch", {"1"}),
                         axis("dtype", {"bf16"})},
                        prepare});
}
