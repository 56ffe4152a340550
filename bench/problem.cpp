#include "problem.h"

#include <cmath>

#include "proxyattn/error.h"

namespace proxyattn::bench {
namespace {

int64_t integer_or(const Case& one, const char* name, int64_t fallback) {
  return one.has(name) ? one.integer(name) : fallback;
}

DType dtype_of(const std::string& name) {
  if (name == "bf16") return DType::kBFloat16;
  if (name == "fp16") return DType::kFloat16;
  PROXYATTN_CHECK(name == "fp32", "bench: dtype must be bf16, fp16 or fp32, got ", name);
  return DType::kFloat32;
}

Pooling pooling_of(const std::string& name) {
  if (name == "mean") return Pooling::kMean;
  PROXYATTN_CHECK(name == "first", "bench: pooling must be mean or first, got ", name);
  return Pooling::kFirst;
}

TokenStrides contiguous(int64_t tokens, int64_t heads, int64_t head_dim) {
  return {tokens * heads * head_dim, heads * head_dim, head_dim};
}

// The fields that every params struct over whole tensors has.
template <typename Params>
void set_lengths(Params& params, const Problem& problem) {
  params.batch = problem.batch;
  params.q_len = problem.length;
  params.kv_len = problem.length;
}

template <typename Params>
void set_heads(Params& params, const Problem& problem) {
  params.q_heads = problem.q_heads;
  params.kv_heads = problem.kv_heads;
  params.head_dim = problem.head_dim;
  params.q_strides = contiguous(problem.length, problem.q_heads, problem.head_dim);
  params.k_strides = contiguous(problem.length, problem.kv_heads, problem.head_dim);
  params.dtype = problem.dtype;
}

template <typename Params>
void set_proxies(Params& params, const Problem& problem) {
  const int64_t tokens = problem.proxy_length();
  params.q_proxy_strides = contiguous(tokens, problem.proxy_heads, problem.head_dim);
  params.k_proxy_strides = contiguous(tokens, problem.key_proxy_heads(), problem.head_dim);
}

template <typename Params>
void set_blocks(Params& params, const Problem& problem) {
  params.q_block = problem.block_size;
  params.kv_block = problem.block_size;
  params.q_offset = 0;
  params.causal = problem.causal;
  params.window = problem.window;
}

}  // namespace

float Problem::scale() const {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
}

int64_t Problem::visible_blocks() const {
  int64_t total = 0;
  for (int64_t m = 0; m < num_blocks(); ++m) total += grid().num_visible(m);
  return total;
}

double Problem::dense_flops() const {
  const double pairs = static_cast<double>(length) * static_cast<double>(length);
  return 4.0 * static_cast<double>(batch * q_heads * head_dim) * pairs * (causal ? 0.5 : 1.0);
}

double Problem::block_flops(int64_t num_executed) const {
  const auto block = static_cast<double>(head_dim * block_size * block_size);
  return 4.0 * block * static_cast<double>(num_executed);
}

BudgetMode budget_mode_of(const std::string& name) {
  if (name == "top_p") return BudgetMode::kTopP;
  PROXYATTN_CHECK(name == "last_block", "bench: mode must be top_p or last_block, got ", name);
  return BudgetMode::kLastBlock;
}

Problem problem_of(const Case& one) {
  Problem problem{};
  problem.batch = integer_or(one, "batch", 1);
  problem.length = one.integer("length");
  problem.q_heads = integer_or(one, "q_heads", 32);
  problem.kv_heads = integer_or(one, "kv_heads", 8);
  problem.proxy_heads = integer_or(one, "proxy_heads", problem.kv_heads);
  problem.head_dim = integer_or(one, "head_dim", 128);
  problem.stride = integer_or(one, "stride", 4);
  problem.block_size = integer_or(one, "block_size", 128);
  problem.window = integer_or(one, "window", 0);
  problem.causal = integer_or(one, "causal", 1) != 0;
  problem.pooling = pooling_of(one.has("pooling") ? one.text("pooling") : "mean");
  problem.dtype = dtype_of(one.has("dtype") ? one.text("dtype") : "bf16");
  PROXYATTN_CHECK(problem.batch >= 1 && problem.length >= 1,
                  "bench: batch and length must be at least 1, got ", one.name());
  PROXYATTN_CHECK(problem.block_size >= 1 && problem.stride >= 1,
                  "bench: block_size and stride must be at least 1, got ", one.name());
  return problem;
}

PoolParams pool_params(const Problem& problem) {
  PoolParams params{};
  set_lengths(params, problem);
  set_heads(params, problem);
  params.proxy_heads = problem.proxy_heads;
  params.stride = problem.stride;
  set_proxies(params, problem);
  params.pooling = problem.pooling;
  return params;
}

ScoreParams score_params(const Problem& problem) {
  ScoreParams params{};
  set_lengths(params, problem);
  set_blocks(params, problem);
  params.proxy_heads = problem.proxy_heads;
  params.key_proxy_heads = problem.key_proxy_heads();
  params.head_dim = problem.head_dim;
  params.stride = problem.stride;
  params.rows = {0, problem.num_blocks()};
  set_proxies(params, problem);
  params.scale = problem.scale();
  params.dtype = problem.dtype;
  return params;
}

NeedParams need_params(const Problem& problem) {
  NeedParams params{};
  set_lengths(params, problem);
  set_heads(params, problem);
  set_blocks(params, problem);
  params.num_sink_blocks = 1;
  params.num_local_blocks = 1;
  params.scale = problem.scale();
  return params;
}

SelectParams select_params(const Problem& problem) {
  SelectParams params{};
  set_lengths(params, problem);
  set_blocks(params, problem);
  params.q_heads = problem.q_heads;
  params.proxy_heads = problem.proxy_heads;
  params.num_sink_blocks = 1;
  params.num_local_blocks = 1;
  params.rows = params.list_rows = {0, problem.num_blocks()};
  params.list_capacity = problem.num_blocks();
  return params;
}

AttentionParams attention_params(const Problem& problem) {
  AttentionParams params{};
  set_lengths(params, problem);
  set_heads(params, problem);
  set_blocks(params, problem);
  params.list_heads = problem.proxy_heads;
  params.list_capacity = problem.num_blocks();
  params.rows = params.list_rows = {0, problem.num_blocks()};
  params.lse_pitch = params.q_len;
  params.v_strides = params.k_strides;
  params.out_strides = params.q_strides;
  params.scale = problem.scale();
  return params;
}

PipelineParams pipeline_params(const Problem& problem) {
  PipelineParams params{};
  set_lengths(params, problem);
  set_heads(params, problem);
  set_blocks(params, problem);
  params.proxy_heads = problem.proxy_heads;
  params.stride = problem.stride;
  params.num_sink_blocks = 1;
  params.num_local_blocks = 1;
  params.v_strides = params.k_strides;
  params.out_strides = params.q_strides;
  params.lse_pitch = params.q_len;
  params.list_rows = {0, problem.num_blocks()};
  params.list_capacity = problem.num_blocks();
  params.max_workspace_bytes = INT64_MAX;
  params.scale = problem.scale();
  params.pooling = problem.pooling;
  return params;
}

std::shared_ptr<Buffer> random_buffer(Machine& machine,
                                      int64_t elements,
                                      DType dtype,
                                      uint64_t seed) {
  auto buffer = empty_buffer(machine, elements * element_bytes(dtype));
  machine.fill_normal(buffer->data(), elements, dtype, seed);
  return buffer;
}

std::shared_ptr<Buffer> empty_buffer(Machine& machine, int64_t bytes) {
  return std::make_shared<Buffer>(machine, bytes);
}

int64_t blocks_for_density(const BlockGrid& grid, double density) {
  int64_t total = 0;
  for (int64_t m = 0; m < grid.num_q_blocks(); ++m) total += grid.visible(m);
  int64_t low = 1;
  int64_t high = max_of<int64_t>(1, grid.num_kv_blocks());
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    int64_t chosen = 0;
    for (int64_t m = 0; m < grid.num_q_blocks(); ++m) {
      chosen += min_of(middle, grid.visible(m));
    }
    if (static_cast<double>(chosen) >= density * static_cast<double>(total)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace proxyattn::bench
