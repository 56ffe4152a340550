#include "proxyattn/pipeline.h"

#include "common/pipeline.h"

namespace proxyattn::cuda {
namespace {

struct Stages {
  static int64_t score_workspace(const ScoreParams& p) { return score_blocks_workspace_bytes(p); }
  static int64_t needs_workspace(const NeedParams& p) { return estimate_needs_workspace_bytes(p); }
  static int64_t attention_workspace(const AttentionParams& p) {
    return block_sparse_attention_workspace_bytes(p);
  }
  static void prepare(const SequenceParams& p, Stream stream) { prepare_sequences(p, stream); }
  static void pool(const PoolParams& p, Stream stream) { pool_heads(p, stream); }
  static void score(const ScoreParams& p, Stream stream) { score_blocks(p, stream); }
  static void needs(const NeedParams& p, Stream stream) { estimate_needs(p, stream); }
  static void select(const SelectParams& p, Stream stream) { select_blocks(p, stream); }
  static void attention(const AttentionParams& p, Stream stream) {
    block_sparse_attention(p, stream);
  }
};

template <PipelineJob kJob>
void run(const PipelineParams& p, Stream stream) {
  const char* op = pipeline_op(kJob, p);
  validate_alignment(op, p);
  Pipeline<Stages, kJob>(p, op).run(stream);
}

}  // namespace

int64_t proxy_attention_workspace_bytes(const PipelineParams& params) {
  return Pipeline<Stages, PipelineJob::kAttend>(params).workspace_bytes();
}

void proxy_attention(const PipelineParams& params, Stream stream) {
  run<PipelineJob::kAttend>(params, stream);
}

int64_t choose_blocks_workspace_bytes(const PipelineParams& params) {
  return Pipeline<Stages, PipelineJob::kChoose>(params).workspace_bytes();
}

void choose_blocks(const PipelineParams& params, Stream stream) {
  run<PipelineJob::kChoose>(params, stream);
}

}  // namespace proxyattn::cuda
