// proxy_attention and choose_blocks as a caller runs them, and the same by one call per stage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "proxyattn/attention.h"
#include "proxyattn/needs.h"
#include "proxyattn/pipeline.h"
#include "proxyattn/pool.h"
#include "proxyattn/score.h"
#include "proxyattn/select.h"

#include "common/math.h"
#include "tensors.h"

namespace proxyattn::test {

struct Outputs {
  Tensor out;
  std::vector<float> lse;
};

inline bool same(const Outputs& a, const Outputs& b) {
  return a.out.same_bits(b.out) && a.lse == b.lse;
}

struct Lists {
  std::vector<int32_t> indices;
  std::vector<int32_t> counts;

  bool operator==(const Lists& other) const {
    return indices == other.indices && counts == other.counts;
  }
};

inline Outputs empty_outputs(const PipelineParams& p) {
  return {Tensor(p.dtype, p.batch, p.q_len, p.q_heads, p.head_dim),
          std::vector<float>(static_cast<std::size_t>(p.batch * p.q_len * p.q_heads))};
}

inline Lists empty_lists(const PipelineParams& p) {
  const int64_t rows = ceil_div(p.q_len, p.q_block);
  const int64_t cells = p.batch * p.proxy_heads * rows * ceil_div(p.kv_len, p.kv_block);
  return {std::vector<int32_t>(static_cast<std::size_t>(cells), -9),
          std::vector<int32_t>(static_cast<std::size_t>(p.batch * p.q_heads * rows), -9)};
}

inline Outputs attend(PipelineParams p) {
  Outputs outputs = empty_outputs(p);
  p.out_strides = outputs.out.strides;
  p.out = outputs.out.data();
  p.lse = outputs.lse.data();
  p.lse_pitch = p.q_len;
  const Workspace workspace(p, cpu::proxy_attention_workspace_bytes(p));
  cpu::proxy_attention(p);
  return outputs;
}

inline Lists choose(PipelineParams p) {
  p.v = nullptr;  // not asked for
  Lists lists = empty_lists(p);
  p.indices = lists.indices.data();
  p.counts = lists.counts.data();
  p.list_rows = {0, ceil_div(p.q_len, p.q_block)};
  p.list_capacity = ceil_div(p.kv_len, p.kv_block);
  const Workspace workspace(p, cpu::choose_blocks_workspace_bytes(p));
  cpu::choose_blocks(p);
  return lists;
}

// Fills what the params of a stage and of the pipeline have in common, by name.
template <typename StageParams>
StageParams shape_of(const PipelineParams& p) {
  StageParams s{};
  s.batch = p.batch;
  s.q_len = p.q_len;
  s.kv_len = p.kv_len;
  return s;
}
template <typename StageParams>
StageParams blocks_of(const PipelineParams& p) {
  StageParams s = shape_of<StageParams>(p);
  s.q_block = p.q_block;
  s.kv_block = p.kv_block;
  s.q_offset = p.q_offset;
  s.causal = p.causal;
  return s;
}

// Of which those of the mode are filled.
struct Needs {
  std::vector<int32_t> budgets;
  std::vector<float> shares;
};

inline Needs estimate(const PipelineParams& p) {
  const auto heads = static_cast<std::size_t>(p.batch * p.q_heads);
  Needs needs{std::vector<int32_t>(heads), std::vector<float>(heads)};
  NeedParams s = blocks_of<NeedParams>(p);
  s.q_heads = p.q_heads;
  s.kv_heads = p.kv_heads;
  s.head_dim = p.head_dim;
  s.num_sink_blocks = p.num_sink_blocks;
  s.num_local_blocks = p.num_local_blocks;
  s.q_strides = p.q_strides;
  s.k_strides = p.k_strides;
  s.q = p.q;
  s.k = p.k;
  s.budgets = needs.budgets.data();
  s.shares = needs.shares.data();
  s.gamma = p.gamma;
  s.scale = p.scale;
  s.mode = p.budget_mode;
  s.dtype = p.dtype;
  const Workspace workspace(s, cpu::estimate_needs_workspace_bytes(s));
  cpu::estimate_needs(s);
  return needs;
}

struct Proxies {
  Tensor q;
  Tensor k;
};

inline Proxies pool(const PipelineParams& p) {
  PoolParams s = shape_of<PoolParams>(p);
  s.q_heads = p.q_heads;
  s.kv_heads = p.kv_heads;
  s.proxy_heads = p.proxy_heads;
  s.head_dim = p.head_dim;
  s.stride = p.stride;
  const int64_t key_heads = s.key_proxy_heads();
  Proxies proxies{Tensor(p.dtype, p.batch, ceil_div(p.q_len, p.stride), p.proxy_heads, p.head_dim),
                  Tensor(p.dtype, p.batch, ceil_div(p.kv_len, p.stride), key_heads, p.head_dim)};
  s.q_strides = p.q_strides;
  s.k_strides = p.k_strides;
  s.q_proxy_strides = proxies.q.strides;
  s.k_proxy_strides = proxies.k.strides;
  s.q = p.q;
  s.k = p.k;
  s.q_proxy = proxies.q.data();
  s.k_proxy = proxies.k.data();
  s.pooling = p.pooling;
  s.dtype = p.dtype;
  cpu::pool_heads(s);
  return proxies;
}

struct Scores {
  std::vector<float> peak;
  std::vector<float> mass;
};

inline Scores score(const PipelineParams& p) {
  const Proxies proxies = pool(p);
  const std::size_t cells = empty_lists(p).indices.size();
  Scores scores{std::vector<float>(cells), std::vector<float>(cells)};
  ScoreParams s = blocks_of<ScoreParams>(p);
  s.proxy_heads = p.proxy_heads;
  s.key_proxy_heads = proxies.k.heads;
  s.head_dim = p.head_dim;
  s.stride = p.stride;
  s.rows = {0, ceil_div(p.q_len, p.q_block)};
  s.q_proxy_strides = proxies.q.strides;
  s.k_proxy_strides = proxies.k.strides;
  s.q_proxy = proxies.q.data();
  s.k_proxy = proxies.k.data();
  s.peak = scores.peak.data();
  s.mass = scores.mass.data();
  s.scale = p.scale;
  s.dtype = p.dtype;
  const Workspace workspace(s, cpu::score_blocks_workspace_bytes(s));
  cpu::score_blocks(s);
  return scores;
}

inline Lists choose_by_stages(const PipelineParams& p) {
  const Scores scores = score(p);
  const Needs needs = estimate(p);
  Lists lists = empty_lists(p);
  SelectParams s = blocks_of<SelectParams>(p);
  s.q_heads = p.q_heads;
  s.proxy_heads = p.proxy_heads;
  s.min_budget = p.min_budget;
  s.num_sink_blocks = p.num_sink_blocks;
  s.num_local_blocks = p.num_local_blocks;
  s.rows = s.list_rows = {0, ceil_div(p.q_len, p.q_block)};
  s.list_capacity = ceil_div(p.kv_len, p.kv_block);
  s.peak = scores.peak.data();
  s.mass = scores.mass.data();
  s.budgets = needs.budgets.data();
  s.shares = p.shares != nullptr ? p.shares : needs.shares.data();
  s.indices = lists.indices.data();
  s.counts = lists.counts.data();
  s.gamma = p.gamma;
  s.budget_mode = p.budget_mode;
  cpu::select_blocks(s);
  return lists;
}

inline Outputs attend_to(const PipelineParams& p, const Lists& lists) {
  Outputs outputs = empty_outputs(p);
  AttentionParams s = blocks_of<AttentionParams>(p);
  s.q_heads = p.q_heads;
  s.kv_heads = p.kv_heads;
  s.head_dim = p.head_dim;
  s.list_heads = p.proxy_heads;
  s.list_capacity = ceil_div(p.kv_len, p.kv_block);
  s.rows = s.list_rows = {0, ceil_div(p.q_len, p.q_block)};
  s.lse_pitch = p.q_len;
  s.q_strides = p.q_strides;
  s.k_strides = p.k_strides;
  s.v_strides = p.v_strides;
  s.out_strides = outputs.out.strides;
  s.q = p.q;
  s.k = p.k;
  s.v = p.v;
  s.indices = lists.indices.data();
  s.counts = lists.counts.data();
  s.out = outputs.out.data();
  s.lse = outputs.lse.data();
  s.scale = p.scale;
  s.lists_are_rankings = true;
  s.dtype = p.dtype;
  const Workspace workspace(s, cpu::block_sparse_attention_workspace_bytes(s));
  cpu::block_sparse_attention(s);
  return outputs;
}

}  // namespace proxyattn::test
