#include "proxyattn/pipeline.h"

#include "common/pipeline.h"

namespace proxyattn::cpu {
namespace {

struct Stages {
  static int64_t score_workspace(const ScoreParams& p) { return score_blocks_workspace_bytes(p); }
  static int64_t budget_workspace(const BudgetParams& p) {
    return estimate_budgets_workspace_bytes(p);
  }
  static int64_t attention_workspace(const AttentionParams& p) {
    return block_sparse_attention_workspace_bytes(p);
  }
  static void pool(const PoolParams& p) { pool_heads(p); }
  static void score(const ScoreParams& p) { score_blocks(p); }
  static void budget(const BudgetParams& p) { estimate_budgets(p); }
  static void select(const SelectParams& p) { select_blocks(p); }
  static void attention(const AttentionParams& p) { block_sparse_attention(p); }
};

}  // namespace

int64_t proxy_attention_workspace_bytes(const PipelineParams& params) {
  validate_pipeline(params);
  return Pipeline<Stages>(params).workspace_bytes();
}

void proxy_attention(const PipelineParams& params) {
  validate_pipeline(params);
  Pipeline<Stages>(params).run();
}

}  // namespace proxyattn::cpu
