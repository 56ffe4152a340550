// proxy_attention and choose_blocks on either device: where each stage's buffers lie in the one
// workspace, how many query blocks are worked on at a time, and the order of the stages.
//
// `Stages` names a device's functions: prepare, pool, score_workspace, score, needs_workspace,
// needs, select, attention_workspace and attention.
#pragma once

#include <cstdint>

#include "proxyattn/error.h"

#include "common/math.h"
#include "common/stage_params.h"
#include "common/tokens.h"
#include "common/validate.h"

namespace proxyattn {

// Without a cap, what grows with the rows worked on at a time (scores, lists, proxies of queries)
// may take this many bytes; longer sequences are worked through in pieces. 512 MiB holds 128K
// tokens in blocks of 64, 256K in blocks of 128, of 8 proxy heads in either budget mode whole.
inline constexpr int64_t kDefaultRowsBytes = int64_t{512} << 20;
inline constexpr int64_t kWorkspaceAlignment = 256;
inline constexpr int64_t kAllBlocksSize = 128;

// True when the settings alone decide that every visible block is chosen.
inline bool chooses_all_blocks(const PipelineParams& p) {
  const int64_t min_budget = min_of(p.min_budget, p.kv_len);  // it may be as large as numbers go
  return p.gamma >= 1.0 || ceil_div(min_budget, p.kv_block) == ceil_div(p.kv_len, p.kv_block);
}

enum class PipelineJob { kAttend, kChoose };

inline const char* pipeline_op(PipelineJob job, const PipelineParams& p) {
  const bool packed = p.packed.q_starts != nullptr;
  if (job == PipelineJob::kAttend) return packed ? "proxy_attention_varlen" : "proxy_attention";
  return packed ? "choose_blocks_varlen" : "choose_blocks";
}

// Hands out a workspace from its start; without one it only counts.
class WorkspaceCursor {
 public:
  explicit WorkspaceCursor(void* workspace) : base_(reinterpret_cast<std::uintptr_t>(workspace)) {}

  void* take(int64_t bytes) {
    const auto address = base_ + static_cast<std::uintptr_t>(taken_);
    taken_ += round_up(bytes, kWorkspaceAlignment);
    return reinterpret_cast<void*>(address);
  }
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take(count * int64_t{sizeof(T)}));
  }
  int64_t taken() const { return taken_; }

 private:
  std::uintptr_t base_;
  int64_t taken_ = 0;
};

template <typename Stages, PipelineJob kJob>
class Pipeline {
 public:
  explicit Pipeline(const PipelineParams& params) : Pipeline(params, pipeline_op(kJob, params)) {}
  // `op` is what errors begin with; of the workspace the first `taken_bytes` are the caller's own.
  Pipeline(const PipelineParams& params, const char* op, int64_t taken_bytes = 0)
      : op_(op), p_(params), taken_bytes_(taken_bytes) {
    validate_pipeline(params, op);
    // Whoever asks for lists gets rankings, whatever the counts are.
    dense_ = kAttends && chooses_all_blocks(p_);
    // Nobody asks for what is in a block: the size that attention is fastest with.
    if (dense_) p_.q_block = p_.kv_block = kAllBlocksSize;
    plan();
    PROXYATTN_CHECK(total_bytes_ <= p_.max_workspace_bytes, op_,
                    ": max_workspace_bytes must be at least ", total_bytes_,
                    ", got max_workspace_bytes=", p_.max_workspace_bytes);
  }

  int64_t workspace_bytes() const { return total_bytes_; }

  template <typename... Extra>  // CUDA: the stream
  void run(Extra... extra) {
    validate_workspace(op_, p_.workspace, p_.workspace_bytes, total_bytes_);
    if (dense_) {
      Stages::attention(attention_params(p_, buffers_), extra...);
      return;
    }
    const int64_t num_blocks = CallSizes(p_).q_blocks();
    int64_t prepared = 0;  // query blocks that the table is of: all, or those of a step
    const auto prepare = [&](const PipelineParams& part) {
      const int64_t blocks = CallSizes(part).q_blocks();
      if (!CallSizes(p_).is_packed() || (prepared == num_blocks && blocks == num_blocks)) return;
      Stages::prepare(table_params(part, buffers_), extra...);
      prepared = blocks;
    };
    if (p_.shares == nullptr) {
      prepare(p_);
      Stages::needs(need_params(p_, buffers_), extra...);
    }
    bool with_keys = true;
    for_each_step([&](const PipelineParams& part) {
      prepare(part);
      Stages::pool(pool_params(part, buffers_, with_keys), extra...);
      Stages::score(score_params(part, buffers_), extra...);
      Stages::select(select_params(part, buffers_), extra...);
      if constexpr (kAttends) Stages::attention(attention_params(part, buffers_), extra...);
      with_keys = false;
    });
  }

 private:
  static constexpr bool kAttends = kJob == PipelineJob::kAttend;

  bool top_p() const { return p_.budget_mode == BudgetMode::kTopP; }

  // From the last query blocks to the first.
  template <typename Visit>
  void for_each_step(const Visit& visit) const {
    for (int64_t end = CallSizes(p_).q_blocks(); end > 0; end -= step_blocks_) {
      visit(part_of(p_, {max_of<int64_t>(0, end - step_blocks_), end}));
    }
  }

  // The stages' own scratch grows with the blocks of a step too, so it is found by trying.
  void plan() {
    step_blocks_ = CallSizes(p_).q_blocks();
    if (dense_) return place();
    if (p_.max_workspace_bytes == INT64_MAX) {
      const int64_t wanted = kDefaultRowsBytes / max_of<int64_t>(1, block_bytes());
      step_blocks_ = min_of(step_blocks_, max_of<int64_t>(1, wanted));
    }
    for (place(); total_bytes_ > p_.max_workspace_bytes && step_blocks_ > 1; place()) {
      step_blocks_ = ceil_div<int64_t>(step_blocks_, 2);
    }
  }

  // Of all proxy heads of a window.
  int64_t proxy_bytes() const { return p_.proxy_heads * p_.head_dim * element_bytes(p_.dtype); }

  // Scores, lists and proxies of one query block, over all entries and heads.
  int64_t block_bytes() const {
    const CallSizes call(p_);
    const int64_t list_bytes = p_.proxy_heads * call.kv_blocks() * int64_t{top_p() ? 12 : 8};
    const int64_t count_bytes = p_.q_heads * int64_t{sizeof(int32_t)};
    return call.entries() * (list_bytes + count_bytes + call.block_windows() * proxy_bytes());
  }

  // Lays the buffers out for steps of step_blocks_.
  void place() {
    WorkspaceCursor cursor(p_.workspace);
    cursor.take(taken_bytes_);
    buffers_ = {};
    if (!dense_) place_lists(cursor);
    buffers_.scratch_bytes = round_up(scratch_bytes(), kWorkspaceAlignment);
    buffers_.scratch = cursor.take(buffers_.scratch_bytes);
    total_bytes_ = cursor.taken();
  }

  // What the stages before attention leave.
  void place_lists(WorkspaceCursor& cursor) {
    const CallSizes call(p_);
    // The last step has a block that may be short; the first has none, unless it is the last.
    const PipelineParams first = part_of(p_, {0, step_blocks_});
    const CallSizes step(first);
    const int64_t key_proxy_bytes = proxy_bytes() / p_.proxy_heads * call.key_proxy_heads();
    buffers_.k_proxy = cursor.take(call.entries() * call.kv_windows() * key_proxy_bytes);
    if (call.is_packed()) buffers_.table = cursor.take(sequence_table_bytes(table_params(p_, {})));
    // Budgets or shares: both take as much.
    static_assert(sizeof(int32_t) == sizeof(float));
    if (p_.shares == nullptr) buffers_.needs = cursor.take<float>(p_.batch * p_.q_heads);
    buffers_.q_proxy = cursor.take(step.entries() * step.q_windows() * proxy_bytes());
    buffers_.peak = cursor.take<float>(step.cells());
    if (top_p()) buffers_.mass = cursor.take<float>(step.cells());
    if (!kAttends) return;
    buffers_.indices = cursor.take<int32_t>(step.cells());
    buffers_.counts = cursor.take<int32_t>(step.counts());
  }

  // The stages run one after another and share their scratch. Each asks anew for every step: what
  // one of them needs does not say what another will.
  int64_t scratch_bytes() const {
    if (dense_) return Stages::attention_workspace(attention_params(p_, buffers_));
    int64_t bytes = 0;
    if (p_.shares == nullptr) bytes = Stages::needs_workspace(need_params(p_, buffers_));
    for_each_step([&](const PipelineParams& part) {
      bytes = max_of(bytes, Stages::score_workspace(score_params(part, buffers_)));
      if (!kAttends) return;
      bytes = max_of(bytes, Stages::attention_workspace(attention_params(part, buffers_)));
    });
    return bytes;
  }

  const char* op_;
  PipelineParams p_;
  const int64_t taken_bytes_;
  bool dense_ = false;
  int64_t step_blocks_ = 0;
  int64_t total_bytes_ = 0;
  StageBuffers buffers_{};
};

}  // namespace proxyattn
