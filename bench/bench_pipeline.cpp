// The whole of proxy_attention, and choose_blocks, its estimation alone.
//
// gamma is so small that every head needs little more than the forced blocks, though that has to be
// found out, and the minimum budget sets how much is read: the least that makes the wanted density,
// of packed sequences that of the longest. TFLOPS count the attention's executed blocks.
//
// What a server has at a time, in one call and one by one:
//   bench_pipeline --device=cuda --length=65536 --seqs=mix --calls=one,each
#include <algorithm>
#include <numeric>

#include "proxyattn/error.h"

#include "checks.h"
#include "pack.h"
#include "problem.h"

namespace {

using namespace proxyattn;
using namespace proxyattn::bench;

// The lists that choose_blocks leaves, [proxy_heads, rows, key blocks] of each batch entry.
struct Lists {
  std::shared_ptr<Buffer> indices;
  std::shared_ptr<Buffer> counts;
  int64_t num_counts;

  Lists(Machine& machine, const Problem& problem, int64_t num_rows)
      : indices(empty_buffer(machine,
                             problem.batch * problem.proxy_heads * num_rows * problem.num_blocks() *
                                 int64_t{sizeof(int32_t)})),
        num_counts(problem.batch * problem.q_heads * num_rows) {
    counts = empty_buffer(machine, num_counts * int64_t{sizeof(int32_t)});
  }
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
  void check(const PipelineParams& pipeline) const {
    check_pool(machine_, pool_);
    check_needs(machine_, need_);
    check_score(machine_, score_);
    SelectParams select = select_;
    select.indices = pipeline.indices;
    select.counts = pipeline.counts;
    select.list_rows = pipeline.list_rows;
    select.list_capacity = pipeline.list_capacity;
    check_select(machine_, select);
  }
  void check() const {
    PipelineParams own{};
    own.indices = select_.indices;
    own.counts = select_.counts;
    own.list_rows = select_.list_rows;
    own.list_capacity = select_.list_capacity;
    check(own);
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
      lists_(machine, problem, problem.num_blocks()),
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
void check_whole(Machine& machine, const Problem& problem, const PipelineParams& pipeline) {
  const Estimation estimation(machine, problem, pipeline);
  estimation.launch();
  estimation.check();
  AttentionParams params = attention_params(problem);
  params.q = pipeline.q;
  params.k = pipeline.k;
  params.v = pipeline.v;
  params.out = pipeline.out;
  params.indices = estimation.lists().indices->as<int32_t>();
  params.counts = estimation.lists().counts->as<int32_t>();
  check_attention(machine, params);
}

void check_lists(Machine& machine, const Problem& problem, const PipelineParams& pipeline) {
  const Estimation estimation(machine, problem, pipeline);
  estimation.launch();
  estimation.check(pipeline);
}

// An op of the chain: proxy_attention or choose_blocks.
struct Job {
  int64_t (*workspace_bytes)(const PipelineParams&);
  void (*run)(const PipelineParams&, Stream);
  void (*check)(Machine&, const Problem&, const PipelineParams&);
};

Job job_of(const Stages& stages, const std::string& part) {
  if (part == "whole") {
    return {stages.proxy_attention_workspace_bytes, stages.proxy_attention, check_whole};
  }
  PROXYATTN_CHECK(part == "estimation", "bench: part must be whole or estimation, got ", part);
  return {stages.choose_blocks_workspace_bytes, stages.choose_blocks, check_lists};
}

// The calls that a launch makes, with room for the neediest of them.
class Calls {
 public:
  Calls(Machine& machine, const Job& job, std::vector<PipelineParams> calls)
      : machine_(machine), job_(job), calls_(std::move(calls)) {
    int64_t bytes = 0;
    for (const PipelineParams& call : calls_) bytes = max_of(bytes, job.workspace_bytes(call));
    workspace_ = empty_buffer(machine, bytes);
    for (PipelineParams& call : calls_) {
      call.workspace = workspace_->data();
      call.workspace_bytes = bytes;
    }
  }

  void launch() const {
    for (const PipelineParams& call : calls_) job_.run(call, machine_.stream());
  }

 private:
  Machine& machine_;
  Job job_;
  std::vector<PipelineParams> calls_;
  std::shared_ptr<Buffer> workspace_;
};

// Blocks that all heads read. Rows of no sequence have none.
int64_t num_chosen(Machine& machine, const PipelineParams& params, const Lists& lists) {
  const Calls choice(machine, job_of(machine.stages(), "estimation"), {params});
  choice.launch();
  const auto counts = download(machine, lists.counts->as<int32_t>(), lists.num_counts);
  return std::accumulate(counts.begin(), counts.end(), int64_t{0},
                         [](int64_t sum, int32_t count) { return sum + max_of(count, 0); });
}

Workload prepare(Machine& machine, const Case& one) {
  const auto pack = std::make_shared<Pack>(machine, one);
  const Problem& problem = pack->longest();
  const Lists lists(machine, problem, pack->num_rows());
  PipelineParams params = pipeline_params(problem);
  pack->place(params);
  params.gamma = one.number("gamma");
  params.budget_mode = budget_mode_of(one.text("mode"));
  params.min_budget =
      blocks_for_density(problem.grid(), one.number("density")) * problem.block_size;
  params.indices = lists.indices->as<int32_t>();
  params.counts = lists.counts->as<int32_t>();

  Workload work;
  if (one.text("part") == "whole") {
    work.flops = problem.block_flops(num_chosen(machine, params, lists));
  }
  std::vector<PipelineParams> calls;
  for (int64_t i = 0; pack->one_by_one() && i < pack->count(); ++i) {
    calls.push_back(pack->alone(params, i));
  }
  if (!pack->one_by_one()) calls.push_back(params);
  const Job job = job_of(machine.stages(), one.text("part"));
  const auto launched = std::make_shared<Calls>(machine, job, calls);
  work.launch = [launched, pack, lists] { launched->launch(); };
  work.check = [&machine, job, pack, params] {
    for (const int64_t i : pack->sample()) {
      job.check(machine, pack->problem(i), pack->alone(params, i));
    }
  };
  return work;
}

std::vector<Axis> axes() {
  std::vector<Axis> all = {{"length", {"4096"}, {"32768", "131072"}},
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
                           axis("dtype", {"bf16"})};
  for (const Axis& axis : pack_axes()) all.push_back(axis);
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(argc, argv, {"pipeline", axes(), prepare});
}
