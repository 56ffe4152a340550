#include "proxyattn/pipeline.h"

#include "common/pipeline.h"

namespace proxyattn::cpu {
namespace {

struct Stages {
  static int64_t score_workspace(const ScoreParams& p) { return score_blocks_workspace_bytes(p); }
  static int64_t needs_workspace(const NeedParams& p) { return estimate_needs_workspace_bytes(p); }
  static int64_t attention_workspace(const AttentionParams& p) {
    return block_sparse_attention_workspace_bytes(p);
  }
  static void pool(const PoolParams& p) { pool_heads(p); }
  static void score(const ScoreParams& p) { score_blocks(p); }
  static void needs(const NeedParams& p) { estimate_needs(p); }
  static void select(const SelectParams& p) { select_blocks(p); }
  static void attention(const AttentionParams& p) { block_sparse_attention(p); }
};

using Attend = Pipeline<Stages, PipelineJob::kAttend>;
using Choose = Pipeline<Stages, PipelineJob::kChoose>;

}  // namespace

int64_t proxy_attention_workspace_bytes(const PipelineParams& params) {
  return Attend(params).workspace_bytes();
}

void proxy_attention(const PipelineParams& params) {
  Attend(params).run();
}

int64_t choose_blocks_workspace_bytes(const PipelineParams& params) {
  return Choose(params).workspace_bytes();
}

void choose_blocks(const PipelineParams& params) {
  Choose(params).run();
}

}  // namespace proxyattn::cpu
