#include "common/stage_params.h"

#include "common/tokens.h"

namespace proxyattn {
namespace {

bool is_top_p(const PipelineParams& p) {
  return p.budget_mode == BudgetMode::kTopP;
}

// Of proxies, `windows` of each entry and head.
TokenStrides proxy_strides(const PipelineParams& p, int64_t windows, int64_t heads) {
  const int64_t window = heads * p.head_dim;
  return {windows * window, window, p.head_dim};
}

// What the stages have in common, by name.
template <typename Params>
void set_lengths(const PipelineParams& p, Params& s) {
  s.batch = p.batch;
  s.q_len = p.q_len;
  s.kv_len = p.kv_len;
  s.q_block = p.q_block;
  s.packed = p.packed;
}

template <typename Params>
void set_blocks(const PipelineParams& p, Params& s) {
  set_lengths(p, s);
  s.kv_block = p.kv_block;
  s.q_offset = p.q_offset;
  s.causal = p.causal;
}

template <typename Params>
void set_tensors(const PipelineParams& p, Params& s) {
  s.q_heads = p.q_heads;
  s.kv_heads = p.kv_heads;
  s.head_dim = p.head_dim;
  s.q_strides = p.q_strides;
  s.k_strides = p.k_strides;
  s.q = p.q;
  s.k = p.k;
  s.dtype = p.dtype;
}

template <typename Params>
void set_proxies(const PipelineParams& p, const StageBuffers& buffers, Params& s) {
  const CallSizes sizes(p);
  s.proxy_heads = p.proxy_heads;
  s.head_dim = p.head_dim;
  s.stride = p.stride;
  s.q_proxy_strides = proxy_strides(p, sizes.q_windows(), p.proxy_heads);
  s.k_proxy_strides = proxy_strides(p, sizes.kv_windows(), sizes.key_proxy_heads());
  s.q_proxy = buffers.q_proxy;
  s.k_proxy = buffers.k_proxy;
  s.dtype = p.dtype;
}

template <typename Params>
void set_scratch(const StageBuffers& buffers, Params& s) {
  s.workspace = buffers.scratch;
  s.workspace_bytes = buffers.scratch_bytes;
}

template <typename Params>
void set_table(const PipelineParams& p, const StageBuffers& buffers, Params& s) {
  s.packed.table = buffers.table;
  s.packed.table_stride = p.stride;
}

}  // namespace

PipelineParams part_of(const PipelineParams& call, const BlockRange& blocks) {
  PipelineParams part = call;
  part.list_rows = {call.list_rows.begin - blocks.begin, call.list_rows.end - blocks.begin};
  if (CallSizes(call).is_packed()) {
    part.packed.blocks = blocks;
    return part;
  }
  const int64_t first_query = blocks.begin * call.q_block;
  part.q_len = min_of(call.q_len, blocks.end * call.q_block) - first_query;
  part.q_offset = call.q_offset + first_query;
  part.q = from_token(call.q, call.q_strides, first_query, call.dtype);
  part.out = from_token(call.out, call.out_strides, first_query, call.dtype);
  part.lse = call.lse == nullptr ? nullptr : call.lse + first_query;
  return part;
}

SequenceParams table_params(const PipelineParams& part, const StageBuffers& buffers) {
  SequenceParams s = sequence_params(part, part.stride);
  s.table = buffers.table;
  return s;
}

PoolParams pool_params(const PipelineParams& part, const StageBuffers& buffers, bool with_keys) {
  PoolParams s{};
  set_lengths(part, s);
  set_tensors(part, s);
  set_proxies(part, buffers, s);
  set_table(part, buffers, s);
  if (!with_keys) s.kv_len = 0;
  s.pooling = part.pooling;
  return s;
}

NeedParams need_params(const PipelineParams& call, const StageBuffers& buffers) {
  NeedParams s{};
  set_blocks(call, s);
  set_tensors(call, s);
  set_table(call, buffers, s);
  set_scratch(buffers, s);
  s.num_sink_blocks = call.num_sink_blocks;
  s.num_local_blocks = call.num_local_blocks;
  if (is_top_p(call)) {
    s.shares = static_cast<float*>(buffers.needs);
  } else {
    s.budgets = static_cast<int32_t*>(buffers.needs);
  }
  s.gamma = call.gamma;
  s.scale = call.scale;
  s.mode = call.budget_mode;
  return s;
}

ScoreParams score_params(const PipelineParams& part, const StageBuffers& buffers) {
  ScoreParams s{};
  const CallSizes sizes(part);
  set_blocks(part, s);
  set_proxies(part, buffers, s);
  set_table(part, buffers, s);
  set_scratch(buffers, s);
  s.key_proxy_heads = sizes.key_proxy_heads();
  s.rows = {0, sizes.q_blocks()};
  s.peak = buffers.peak;
  s.mass = buffers.mass;
  s.scale = part.scale;
  // Rows that the budgets alone decide: not where lists are the result, nor with top-p, where
  // counts come from the scores. Of packed sequences each would have to be asked.
  const bool budgets_decide = buffers.counts != nullptr && !is_top_p(part) && !sizes.is_packed();
  s.budgets = budgets_decide ? static_cast<const int32_t*>(buffers.needs) : nullptr;
  s.q_heads = part.q_heads;
  return s;
}

SelectParams select_params(const PipelineParams& part, const StageBuffers& buffers) {
  SelectParams s{};
  const CallSizes sizes(part);
  const bool lists_stay_inside = buffers.counts != nullptr;
  set_blocks(part, s);
  set_table(part, buffers, s);
  s.q_heads = part.q_heads;
  s.proxy_heads = part.proxy_heads;
  s.min_budget = part.min_budget;
  s.num_sink_blocks = part.num_sink_blocks;
  s.num_local_blocks = part.num_local_blocks;
  s.rows = {0, sizes.q_blocks()};
  s.list_rows = lists_stay_inside ? s.rows : part.list_rows;
  s.list_capacity = lists_stay_inside ? sizes.kv_blocks() : part.list_capacity;
  s.peak = buffers.peak;
  s.mass = buffers.mass;
  if (!is_top_p(part)) {
    s.budgets = static_cast<const int32_t*>(buffers.needs);
  } else {
    s.shares = part.shares != nullptr ? part.shares : static_cast<const float*>(buffers.needs);
  }
  s.indices = lists_stay_inside ? buffers.indices : part.indices;
  s.counts = lists_stay_inside ? buffers.counts : part.counts;
  s.gamma = part.gamma;
  s.budget_mode = part.budget_mode;
  s.only_prefixes = lists_stay_inside;
  return s;
}

AttentionParams attention_params(const PipelineParams& part, const StageBuffers& buffers) {
  AttentionParams s{};
  const CallSizes sizes(part);
  set_blocks(part, s);
  set_tensors(part, s);
  set_table(part, buffers, s);
  set_scratch(buffers, s);
  s.list_heads = part.proxy_heads;
  s.list_capacity = sizes.kv_blocks();
  s.rows = s.list_rows = {0, sizes.q_blocks()};
  s.lse_pitch = part.lse_pitch;
  s.v_strides = part.v_strides;
  s.out_strides = part.out_strides;
  s.v = part.v;
  s.indices = buffers.indices;
  s.counts = buffers.counts;
  s.out = part.out;
  s.lse = part.lse;
  s.scale = part.scale;
  s.lists_are_rankings = buffers.indices != nullptr;
  return s;
}

}  // namespace proxyattn
