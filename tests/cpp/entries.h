// What a device's public functions refuse of a batch and of packed sequences, before they look at
// the device.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "proxyattn/attention.h"
#include "proxyattn/error.h"
#include "proxyattn/needs.h"
#include "proxyattn/pipeline.h"
#include "proxyattn/pool.h"
#include "proxyattn/score.h"
#include "proxyattn/select.h"

#include "check.h"

namespace proxyattn::test {

struct Entries {
  std::function<void(const PoolParams&)> pool_heads;
  std::function<void(const ScoreParams&)> score_blocks;
  std::function<void(const NeedParams&)> estimate_needs;
  std::function<void(const SelectParams&)> select_blocks;
  std::function<void(const AttentionParams&)> block_sparse_attention;
  std::function<void(const PipelineParams&)> choose_blocks;
  std::function<void(const PipelineParams&)> proxy_attention;
};

// Right but for what the caller makes of it: 65 causal queries and as many keys.
template <typename Params>
Params good_params() {
  Params p{};
  p.batch = 1;
  p.q_len = p.kv_len = 65;
  p.head_dim = 64;
  return p;
}

template <typename Params>
void set_blocks(Params& p) {
  p.q_block = p.kv_block = 64;
  p.causal = true;
}

template <typename Params>
void set_heads(Params& p) {
  p.q_heads = p.kv_heads = 1;
  p.scale = 1.0f;
}

inline PoolParams good_pool() {
  PoolParams p = good_params<PoolParams>();
  p.q_heads = p.kv_heads = p.proxy_heads = 1;
  p.q_block = 64;
  p.stride = 4;
  return p;
}

inline ScoreParams good_score() {
  ScoreParams p = good_params<ScoreParams>();
  set_blocks(p);
  p.proxy_heads = p.key_proxy_heads = 1;
  p.stride = 4;
  p.scale = 1.0f;
  return p;
}

inline NeedParams good_needs(BudgetMode mode) {
  NeedParams p = good_params<NeedParams>();
  set_blocks(p);
  set_heads(p);
  p.mode = mode;
  return p;
}

inline SelectParams good_select() {
  SelectParams p{};
  p.batch = 1;
  p.q_len = p.kv_len = 65;
  set_blocks(p);
  p.q_heads = p.proxy_heads = 1;
  return p;
}

inline AttentionParams good_attention() {
  AttentionParams p = good_params<AttentionParams>();
  set_blocks(p);
  set_heads(p);
  p.list_heads = 1;
  return p;
}

inline PipelineParams good_pipeline() {
  PipelineParams p = good_params<PipelineParams>();
  set_blocks(p);
  set_heads(p);
  p.proxy_heads = 1;
  p.stride = 4;
  p.max_workspace_bytes = INT64_MAX;
  return p;
}

template <typename Params>
void check_alignment(const std::string& op,
                     const std::function<void(const Params&)>& entry,
                     Params p) {
  p.kv_len = 64;
  p.q_offset = -1;
  CHECK_THROWS(InvalidArgument,
               op + ": q_len must be at most kv_len when causal, got q_len=65, kv_len=64",
               entry(p));
}

inline void check_all_alignments(const Entries& entries) {
  check_alignment("score_blocks", entries.score_blocks, good_score());
  check_alignment("estimate_budgets", entries.estimate_needs, good_needs(BudgetMode::kLastBlock));
  check_alignment("estimate_shares", entries.estimate_needs, good_needs(BudgetMode::kTopP));
  check_alignment("select_blocks", entries.select_blocks, good_select());
  check_alignment("block_sparse_attention", entries.block_sparse_attention, good_attention());
  check_alignment("choose_blocks", entries.choose_blocks, good_pipeline());
  check_alignment("proxy_attention", entries.proxy_attention, good_pipeline());
}

template <typename Params>
void check_packed(const std::string& sentence,
                  const std::function<void(const Params&)>& entry,
                  Params p) {
  static const int32_t some_start = 0;
  p.packed.q_starts = p.packed.kv_starts = &some_start;
  p.packed.total_q = p.packed.total_kv = 65;
  CHECK_THROWS(InvalidArgument, sentence, entry(p));
}

// Stages alone, of packed sequences that nobody has prepared.
inline void check_all_packed(const Entries& entries, const std::string& sentence) {
  check_packed("pool_heads" + sentence, entries.pool_heads, good_pool());
  check_packed("score_blocks" + sentence, entries.score_blocks, good_score());
  check_packed("estimate_shares" + sentence, entries.estimate_needs, good_needs(BudgetMode::kTopP));
  check_packed("select_blocks" + sentence, entries.select_blocks, good_select());
}

}  // namespace proxyattn::test
