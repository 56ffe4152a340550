// The attention problem that a case describes, and every stage's params for it with the sizes,
// strides and scalars filled in. Tensors are contiguous; pointers are the benchmark's to set.
#pragma once

#include <cstdint>

#include "common/block_grid.h"
#include "harness.h"

namespace proxyattn::bench {

struct Problem {
  int64_t batch;
  int64_t length;  // tokens of queries and of keys
  int64_t q_heads;
  int64_t kv_heads;
  int64_t proxy_heads;
  int64_t head_dim;
  int64_t stride;
  int64_t block_size;
  int64_t window;  // keys that a query sees; 0: all
  bool causal;
  Pooling pooling;
  DType dtype;

  BlockGrid grid() const { return {length, length, block_size, block_size, 0, causal, window}; }
  int64_t num_blocks() const { return ceil_div(length, block_size); }
  int64_t proxy_length() const { return ceil_div(length, stride); }
  float scale() const;

  int64_t q_elements() const { return batch * length * q_heads * head_dim; }
  int64_t kv_elements() const { return batch * length * kv_heads * head_dim; }
  int64_t key_proxy_heads() const { return min_of(proxy_heads, kv_heads); }
  int64_t q_proxy_elements() const { return batch * proxy_length() * proxy_heads * head_dim; }
  int64_t k_proxy_elements() const { return batch * proxy_length() * key_proxy_heads() * head_dim; }
  int64_t cells() const { return batch * proxy_heads * num_blocks() * num_blocks(); }
  // Visible (query block, key block) pairs of one head.
  int64_t visible_blocks() const;
  // 4 operations for each dimension of each (query, key) pair, half of the pairs when causal.
  double dense_flops() const;
  // Of a number of whole blocks.
  double block_flops(int64_t num_executed) const;
};

// Axes that the benchmark doesn't have take the defaults of the function.
Problem problem_of(const Case& one);
BudgetMode budget_mode_of(const std::string& name);

PoolParams pool_params(const Problem& problem);
ScoreParams score_params(const Problem& problem);
NeedParams need_params(const Problem& problem);
SelectParams select_params(const Problem& problem);
AttentionParams attention_params(const Problem& problem);
PipelineParams pipeline_params(const Problem& problem);

// Normal random values, `elements` of them.
std::shared_ptr<Buffer> random_buffer(Machine& machine,
                                      int64_t elements,
                                      DType dtype,
                                      uint64_t seed);
std::shared_ptr<Buffer> empty_buffer(Machine& machine, int64_t bytes);
template <typename T>
std::shared_ptr<Buffer> uploaded(Machine& machine, const std::vector<T>& values) {
  const auto bytes = static_cast<int64_t>(values.size() * sizeof(T));
  auto buffer = empty_buffer(machine, bytes);
  machine.upload(buffer->data(), values.data(), bytes);
  return buffer;
}

// The fewest blocks per row that make a share `density` of the visible blocks.
int64_t blocks_for_density(const BlockGrid& grid, double density);

}  // namespace proxyattn::bench
