// proxy_attention on the CPU: the chain of the stages, in one piece and in several.
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "proxyattn/attention.h"
#include "proxyattn/needs.h"
#include "proxyattn/error.h"
#include "proxyattn/pipeline.h"
#include "proxyattn/pool.h"
#include "proxyattn/score.h"
#include "proxyattn/select.h"

#include "check.h"
#include "common/block_grid.h"
#include "families.h"
#include "tensors.h"

namespace proxyattn {
namespace {

using test::Tensor;

constexpr int64_t kNoCap = std::numeric_limits<int64_t>::max();

struct Inputs {
  Tensor q;
  Tensor k;
  Tensor v;
};

Inputs random_inputs(DType dtype, int64_t q_len, int64_t kv_len) {
  return {Tensor(dtype, 2, q_len, 4, 64, 8).fill_normal(1),
          Tensor(dtype, 2, kv_len, 2, 64).fill_normal(2),
          Tensor(dtype, 2, kv_len, 2, 64, 16).fill_normal(3)};
}

PipelineParams params_of(const Inputs& in, BudgetMode mode, double gamma) {
  PipelineParams p{};
  p.batch = in.q.batch;
  p.q_len = in.q.tokens;
  p.kv_len = in.k.tokens;
  p.q_heads = in.q.heads;
  p.kv_heads = in.k.heads;
  p.proxy_heads = 2;
  p.head_dim = in.q.head_dim;
  p.stride = 4;
  p.q_block = 64;
  p.kv_block = 64;
  p.q_offset = in.k.tokens - in.q.tokens;
  p.num_sink_blocks = 1;
  p.num_local_blocks = 1;
  p.q_strides = in.q.strides;
  p.k_strides = in.k.strides;
  p.v_strides = in.v.strides;
  p.q = in.q.data();
  p.k = in.k.data();
  p.v = in.v.data();
  p.max_workspace_bytes = kNoCap;
  p.gamma = gamma;
  p.scale = 0.25f;
  p.budget_mode = mode;
  p.causal = true;
  p.dtype = in.q.dtype;
  return p;
}

struct Outputs {
  Tensor out;
  std::vector<float> lse;
};

Outputs empty_outputs(const Inputs& in) {
  return {Tensor(in.q.dtype, in.q.batch, in.q.tokens, in.q.heads, in.q.head_dim),
          std::vector<float>(static_cast<std::size_t>(in.q.batch * in.q.tokens * in.q.heads))};
}

bool same(const Outputs& a, const Outputs& b) {
  return a.out.same_bits(b.out) && a.lse == b.lse;
}

Outputs run(const Inputs& in, PipelineParams p) {
  Outputs outputs = empty_outputs(in);
  p.out_strides = outputs.out.strides;
  p.out = outputs.out.data();
  p.lse = outputs.lse.data();
  const test::Workspace workspace(p, cpu::proxy_attention_workspace_bytes(p));
  cpu::proxy_attention(p);
  return outputs;
}

// The same by one call per stage.
Outputs run_stages(const Inputs& in, const PipelineParams& p) {
  const BlockGrid grid{p.q_len, p.kv_len, p.q_block, p.kv_block, p.q_offset, p.causal};
  const BlockRange rows{0, grid.num_q_blocks()};
  Tensor q_proxy(p.dtype, p.batch, ceil_div(p.q_len, p.stride), p.proxy_heads, p.head_dim);
  Tensor k_proxy(p.dtype, p.batch, ceil_div(p.kv_len, p.stride), p.proxy_heads, p.head_dim);
  cpu::pool_heads({p.batch, p.q_len, p.kv_len, p.q_heads, p.kv_heads, p.proxy_heads, p.head_dim,
                   p.stride, p.q_strides, p.k_strides, q_proxy.strides, k_proxy.strides, p.q, p.k,
                   q_proxy.data(), k_proxy.data(), p.dtype});

  const auto cells =
      static_cast<std::size_t>(p.batch * p.proxy_heads * rows.end * grid.num_kv_blocks());
  std::vector<float> peak(cells), mass(cells);
  ScoreParams score{
      p.batch,        p.q_len,        p.kv_len,    p.proxy_heads, p.head_dim,      p.stride,
      p.q_block,      p.kv_block,     p.q_offset,  rows,          q_proxy.strides, k_proxy.strides,
      q_proxy.data(), k_proxy.data(), peak.data(), mass.data(),   nullptr,         0,
      p.scale,        p.causal,       p.dtype};
  const test::Workspace score_workspace(score, cpu::score_blocks_workspace_bytes(score));
  cpu::score_blocks(score);

  std::vector<int32_t> budgets(static_cast<std::size_t>(p.batch * p.q_heads));
  NeedParams budget{p.batch,     p.q_len,   p.kv_len,   p.q_heads,      p.kv_heads,
                      p.head_dim,  p.q_block, p.kv_block, p.q_offset,     p.q_strides,
                      p.k_strides, p.q,       p.k,        budgets.data(), nullptr,
                      0,           p.gamma,   p.scale,    p.causal,       p.dtype};
  const test::Workspace needs_workspace(budget, cpu::estimate_needs_workspace_bytes(budget));
  cpu::estimate_needs(budget);

  std::vector<int32_t> indices(cells);
  std::vector<int32_t> counts(static_cast<std::size_t>(p.batch * p.q_heads * rows.end));
  std::vector<double> shares(budgets.size());
  cpu::select_blocks({p.batch,       p.q_len,           p.kv_len,           p.q_heads,
                      p.proxy_heads, p.q_block,         p.kv_block,         p.q_offset,
                      p.min_budget,  p.num_sink_blocks, p.num_local_blocks, rows,
                      peak.data(),   mass.data(),       budgets.data(),     indices.data(),
                      counts.data(), shares.data(),     p.budget_mode,      p.causal});

  Outputs outputs = empty_outputs(in);
  AttentionParams attention{p.batch,
                            p.q_len,
                            p.kv_len,
                            p.q_heads,
                            p.kv_heads,
                            p.head_dim,
                            p.proxy_heads,
                            grid.num_kv_blocks(),
                            p.q_block,
                            p.kv_block,
                            p.q_offset,
                            rows,
                            p.q_strides,
                            p.k_strides,
                            p.v_strides,
                            outputs.out.strides,
                            p.q,
                            p.k,
                            p.v,
                            indices.data(),
                            counts.data(),
                            outputs.out.data(),
                            outputs.lse.data(),
                            nullptr,
                            {},
                            0,
                            p.scale,
                            p.causal,
                            true,
                            p.dtype};
  const test::Workspace workspace(attention,
                                  cpu::block_sparse_attention_workspace_bytes(attention));
  cpu::block_sparse_attention(attention);
  return outputs;
}

TEST(the_pipeline_is_the_chain_of_its_stages) {
  test::for_each_family([] {
    for (const DType dtype : test::kAllDTypes) {
      const Inputs in = random_inputs(dtype, 700, 901);
      for (const BudgetMode mode : {BudgetMode::kLastBlock, BudgetMode::kTopP}) {
        const PipelineParams p = params_of(in, mode, 0.6);
        CHECK(same(run(in, p), run_stages(in, p)));
      }
    }
  });
}

TEST(threads_change_nothing) {
  const Inputs in = random_inputs(DType::kFloat32, 700, 901);
  const PipelineParams p = params_of(in, BudgetMode::kTopP, 0.6);
  const Outputs whole = run(in, p);
  test::for_some_thread_counts([&] { CHECK(same(run(in, p), whole)); });
}

TEST(less_workspace_gives_the_same_bits) {
  const Inputs in = random_inputs(DType::kFloat32, 1400, 1500);
  for (const BudgetMode mode : {BudgetMode::kLastBlock, BudgetMode::kTopP}) {
    PipelineParams p = params_of(in, mode, 0.6);
    const Outputs whole = run(in, p);
    const int64_t uncapped = cpu::proxy_attention_workspace_bytes(p);
    int64_t smaller = 0;
    for (int64_t cap = uncapped - 1;; cap = cpu::proxy_attention_workspace_bytes(p) - 1) {
      p.max_workspace_bytes = cap;
      try {
        const Outputs pieces = run(in, p);
        CHECK(same(pieces, whole));
        CHECK(cpu::proxy_attention_workspace_bytes(p) <= cap);
        ++smaller;
      } catch (const InvalidArgument& error) {
        const std::string text = error.what();
        CHECK(text.find("proxy_attention: max_workspace_bytes must be at least ") == 0);
        break;
      }
    }
    CHECK(smaller >= 2);
  }
}

TEST(gamma_of_one_and_large_minimums_are_dense_attention) {
  const Inputs in = random_inputs(DType::kFloat32, 300, 300);
  for (const BudgetMode mode : {BudgetMode::kLastBlock, BudgetMode::kTopP}) {
    const Outputs dense = run(in, params_of(in, mode, 1.0));
    PipelineParams p = params_of(in, mode, 0.5);
    CHECK(!same(run(in, p), dense));
    for (const int64_t min_budget : {int64_t{300}, kNoCap}) {
      p.min_budget = min_budget;
      CHECK(same(run(in, p), dense));
    }
  }
}

TEST(empty_inputs) {
  for (const double gamma : {0.5, 1.0}) {
    const Inputs no_queries = random_inputs(DType::kFloat32, 0, 100);
    CHECK(run(no_queries, params_of(no_queries, BudgetMode::kTopP, gamma)).lse.empty());
    const Inputs no_keys = random_inputs(DType::kFloat32, 100, 0);
    PipelineParams p = params_of(no_keys, BudgetMode::kTopP, gamma);
    p.causal = false;
    const Outputs nothing = run(no_keys, p);
    CHECK_EQ(nothing.out.at(1, 99, 3, 63), 0.0);
    CHECK_EQ(nothing.lse.back(), -std::numeric_limits<float>::infinity());
  }
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
