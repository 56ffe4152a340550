#include "proxyattn/pipeline.h"

#include "common/pipeline.h"
#include "cpu/sequences.h"
#include "cpu/stages.h"

namespace proxyattn::cpu {
namespace {

struct Stages {
  static int64_t score_workspace(const ScoreParams& p) { return score_blocks_workspace_bytes(p); }
  static int64_t needs_workspace(const NeedParams& p) { return estimate_needs_workspace_bytes(p); }
  static int64_t attention_workspace(const AttentionParams& p) {
    return block_sparse_attention_workspace_bytes(p);
  }
  static void prepare(const SequenceParams&) {}  // they come one by one
  static void pool(const PoolParams& p) { pool_heads(p); }
  static void score(const ScoreParams& p) { run_score(p); }
  static void needs(const NeedParams& p) { run_needs(p); }
  static void select(const SelectParams& p) { run_select(p); }
  static void attention(const AttentionParams& p) { run_attention(p); }
};

// What lies in front of the stages' buffers: gathered keys, and values where they are attended to.
template <PipelineJob kJob>
int64_t taken_bytes(const PipelineParams& p) {
  return (kJob == PipelineJob::kAttend ? 2 : 1) * gathered_bytes(p);
}

template <PipelineJob kJob>
int64_t workspace_bytes(const PipelineParams& p) {
  const char* op = pipeline_op(kJob, p);
  validate_pipeline(p, op);
  return Pipeline<Stages, kJob>(longest_sequence(p), op, taken_bytes<kJob>(p)).workspace_bytes();
}

template <PipelineJob kJob>
void run(const PipelineParams& p) {
  const char* op = pipeline_op(kJob, p);
  validate_alignment(op, p);
  validate_workspace(op, p.workspace, p.workspace_bytes, workspace_bytes<kJob>(p));
  for_each_sequence(p, [&](PipelineParams dense, const Sequence& sequence) {
    if (p.shares != nullptr) dense.shares += sequence.idx * p.q_heads;
    // A shorter sequence would take larger steps, for which the room may be too small.
    if (p.packed.q_starts != nullptr) dense.max_workspace_bytes = p.workspace_bytes;
    Pipeline<Stages, kJob>(dense, op, taken_bytes<kJob>(p)).run();
  });
}

}  // namespace

int64_t proxy_attention_workspace_bytes(const PipelineParams& params) {
  return workspace_bytes<PipelineJob::kAttend>(params);
}

void proxy_attention(const PipelineParams& params) {
  run<PipelineJob::kAttend>(params);
}

int64_t choose_blocks_workspace_bytes(const PipelineParams& params) {
  return workspace_bytes<PipelineJob::kChoose>(params);
}

void choose_blocks(const PipelineParams& params) {
  run<PipelineJob::kChoose>(params);
}

}  // namespace proxyattn::cpu
