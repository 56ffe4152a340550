#include "proxyattn/pipeline.h"

#include "common/pipeline.h"

namespace proxyattn::cuda {
namespace {

struct Stages {
  static int64_t score_workspace(const ScoreParams& p) { return score_blocks_workspace_bytes(p); }
  static int64_t budget_workspace(const BudgetParams& p) {
    return estimate_budgets_workspace_bytes(p);
  }
  static int64_t attention_workspace(const AttentionParams& p) {
    return block_sparse_attention_workspace_bytes(p);
  }
  static void pool(const PoolParams& p, Stream stream) { pool_heads(p, stream); }
  static void score(const ScoreParams& p, Stream stream) { score_blocks(p, stream); }
  static void budget(const BudgetParams& p, Stream stream) { estimate_budgets(p, stream); }
  static void select(const SelectParams& p, Stream stream) { select_blocks(p, stream); }
  static void attention(const AttentionParams& p, Stream stream) {
    block_sparse_attention(p, stream);
  }
};

}  // namespace

int64_t proxy_attention_workspace_bytes(const PipelineParams& params) {
  validate_pipeline(params);
  return Pipeline<Stages>(params).workspace_bytes();
}

void proxy_attention(const PipelineParams& params, Stream stream) {
  validate_pipeline(params);
  Pipeline<Stages>(params).run(stream);
}

}  // namespace proxyattn::cuda
