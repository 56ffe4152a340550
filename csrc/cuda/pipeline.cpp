#include "proxyattn/pipeline.h"

#include "common/pipeline.h"
#include "cuda/common/limits.h"

namespace proxyattn::cuda {
namespace {

struct Stages {
  static int64_t score_workspace(const ScoreParams& p) { return score_blocks_workspace_bytes(p); }
  static int64_t needs_workspace(const NeedParams& p) { return estimate_needs_workspace_bytes(p); }
  static int64_t attention_workspace(const AttentionParams& p) {
    return block_sparse_attention_workspace_bytes(p);
  }
  static void pool(const PoolParams& p, Stream stream) { pool_heads(p, stream); }
  static void score(const ScoreParams& p, Stream stream) { score_blocks(p, stream); }
  static void needs(const NeedParams& p, Stream stream) { estimate_needs(p, stream); }
  static void select(const SelectParams& p, Stream stream) { select_blocks(p, stream); }
  static void attention(const AttentionParams& p, Stream stream) {
    block_sparse_attention(p, stream);
  }
};

using Attend = Pipeline<Stages, PipelineJob::kAttend>;
using Choose = Pipeline<Stages, PipelineJob::kChoose>;

template <PipelineJob kJob>
void check_window(const PipelineParams& p) {
  const bool chooses = kJob == PipelineJob::kChoose || !chooses_all_blocks(p);
  if (chooses) check_no_window(pipeline_op(kJob, p), p.window);
}

}  // namespace

int64_t proxy_attention_workspace_bytes(const PipelineParams& params) {
  check_window<PipelineJob::kAttend>(params);
  return Attend(params).workspace_bytes();
}

void proxy_attention(const PipelineParams& params, Stream stream) {
  Attend(params).run(stream);
}

int64_t choose_blocks_workspace_bytes(const PipelineParams& params) {
  check_window<PipelineJob::kChoose>(params);
  return Choose(params).workspace_bytes();
}

void choose_blocks(const PipelineParams& params, Stream stream) {
  Choose(params).run(stream);
}

}  // namespace proxyattn::cuda
