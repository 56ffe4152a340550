// proxy_attention and choose_blocks on either device: where each stage's buffers lie in the one
// workspace, how many query blocks are worked on at a time, and the order of the stages.
//
// `Stages` names a device's functions: pool, score_workspace, score, needs_workspace, needs,
// select, attention_workspace and attention.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proxyattn/error.h"

#include "common/block_grid.h"
#include "common/math.h"
#include "common/validate.h"

namespace proxyattn {

// Without a cap, what grows with the rows worked on at a time (scores, lists, proxies of queries)
// may take this many bytes; longer sequences are worked through in pieces. 512 MiB holds 128K
// tokens in blocks of 64, 256K in blocks of 128, of 8 proxy heads in either budget mode whole.
inline constexpr int64_t kDefaultRowsBytes = int64_t{512} << 20;
inline constexpr int64_t kWorkspaceAlignment = 256;
inline constexpr int64_t kAllBlocksSize = 128;
// Kernels read queries in whole tiles, up to this many rows behind those that they are asked for.
// What they make of them is dropped.
inline constexpr int64_t kSpareQueries = 256;

inline BlockGrid pipeline_grid(const PipelineParams& p) {
  return {p.q_len, p.kv_len, p.q_block, p.kv_block, p.q_offset, p.causal, p.window};
}

// True when the settings alone decide that every visible block is chosen.
inline bool chooses_all_blocks(const PipelineParams& p) {
  const int64_t min_budget = min_of(p.min_budget, p.kv_len);  // it may be as large as numbers go
  return p.gamma >= 1.0 || ceil_div(min_budget, p.kv_block) >= pipeline_grid(p).most_visible();
}

enum class PipelineJob { kAttend, kChoose };

inline const char* pipeline_op(PipelineJob job, const PipelineParams& p) {
  const bool packed = p.packed.q_starts != nullptr;
  if (job == PipelineJob::kAttend) return packed ? "proxy_attention_varlen" : "proxy_attention";
  return packed ? "choose_blocks_varlen" : "choose_blocks";
}

template <typename Stages, PipelineJob kJob>
class Pipeline {
 public:
  explicit Pipeline(const PipelineParams& params) : Pipeline(params, pipeline_op(kJob, params)) {}
  // `op` is what errors begin with; of the workspace the first `taken_bytes` are the caller's own.
  Pipeline(const PipelineParams& params, const char* op, int64_t taken_bytes = 0)
      : op_(op), p_(params), grid_(pipeline_grid(p_)) {
    validate_pipeline(params, op);
    // Whoever asks for lists gets rankings, whatever the counts are.
    dense_ = kAttends && chooses_all_blocks(p_);
    if (dense_) {
      // Nobody asks for what is in a block: the size that attention is fastest with.
      p_.q_block = p_.kv_block = kAllBlocksSize;
      grid_ = pipeline_grid(p_);
    }
    take(taken_bytes);
    plan();
  }

  int64_t workspace_bytes() const { return total_bytes_; }

  template <typename... Extra>  // CUDA: the stream
  void run(Extra... extra) {
    validate_workspace(op_, p_.workspace, p_.workspace_bytes, total_bytes_);
    const int64_t num_rows = grid_.num_q_blocks();
    if (dense_) {
      Stages::attention(attention_params({0, num_rows}), extra...);
      return;
    }
    if (p_.shares == nullptr) Stages::needs(need_params(), extra...);
    for (int64_t end = num_rows; end > 0; end -= rows_per_step_) {
      const BlockRange rows{max_of<int64_t>(0, end - rows_per_step_), end};
      Stages::pool(pool_params(rows), extra...);
      Stages::score(score_params(rows), extra...);
      Stages::select(select_params(rows), extra...);
      if constexpr (kAttends) Stages::attention(attention_params(rows), extra...);
    }
  }

 private:
  static constexpr bool kAttends = kJob == PipelineJob::kAttend;

  bool top_p() const { return p_.budget_mode == BudgetMode::kTopP; }

  // Offset of a buffer of `bytes` bytes, laid behind those taken so far.
  int64_t take(int64_t bytes) {
    const int64_t offset = total_bytes_;
    total_bytes_ += round_up(bytes, kWorkspaceAlignment);
    return offset;
  }

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(p_.workspace) + offset);
  }

  void plan() {
    const int64_t num_rows = grid_.num_q_blocks();
    rows_per_step_ = num_rows;
    if (dense_) {
      stage_ = take(Stages::attention_workspace(attention_params({0, num_rows})));
      check_cap();
      return;
    }
    k_proxy_ = take(p_.batch * ceil_div(p_.kv_len, p_.stride) * key_proxy_bytes());
    // Budgets or shares: both take as much.
    static_assert(sizeof(int32_t) == sizeof(float));
    needs_ = take(p_.shares == nullptr ? p_.batch * p_.q_heads * int64_t{sizeof(float)} : 0);
    const int64_t fixed_bytes = total_bytes_;
    if (p_.max_workspace_bytes == INT64_MAX) {
      rows_per_step_ = kDefaultRowsBytes / max_of<int64_t>(1, row_bytes());
      rows_per_step_ = min_of(num_rows, max_of<int64_t>(1, rows_per_step_));
    }
    // The stages' own scratch grows with the rows too, so the step is found by trying.
    for (place_rows(); total_bytes_ > p_.max_workspace_bytes && rows_per_step_ > 1; place_rows()) {
      total_bytes_ = fixed_bytes;
      rows_per_step_ = ceil_div<int64_t>(rows_per_step_, 2);
    }
    check_cap();
  }

  int64_t key_proxy_heads() const { return min_of(p_.proxy_heads, p_.kv_heads); }
  // Of all proxy heads of a sampled token.
  int64_t proxy_bytes() const { return p_.proxy_heads * p_.head_dim * element_bytes(); }
  int64_t key_proxy_bytes() const { return key_proxy_heads() * p_.head_dim * element_bytes(); }
  int64_t element_bytes() const { return p_.dtype == DType::kFloat32 ? 4 : 2; }
  int64_t block_queries() const { return p_.q_block / p_.stride; }  // sampled, of a query block
  // Sampled queries of a step.
  int64_t step_queries() const {
    return min_of(ceil_div(p_.q_len, p_.stride), rows_per_step_ * block_queries());
  }

  // Scores, lists and proxies of one query block, over all batches and heads.
  int64_t row_bytes() const {
    const int64_t lists = p_.batch * p_.proxy_heads * grid_.num_kv_blocks();
    return lists * int64_t{top_p() ? 12 : 8} +
           p_.batch * (p_.q_heads * int64_t{sizeof(int32_t)} + block_queries() * proxy_bytes());
  }

  void place_rows() {
    const int64_t rows = rows_per_step_;
    const int64_t cells = p_.batch * p_.proxy_heads * rows * grid_.num_kv_blocks();
    q_proxy_ = take((p_.batch * step_queries() + kSpareQueries) * proxy_bytes());
    peak_ = take(cells * int64_t{sizeof(float)});
    mass_ = take(top_p() ? cells * int64_t{sizeof(float)} : 0);
    indices_ = take(kAttends ? cells * int64_t{sizeof(int32_t)} : 0);
    counts_ = take(kAttends ? p_.batch * p_.q_heads * rows * int64_t{sizeof(int32_t)} : 0);
    // The stages run one after another and share their scratch.
    const BlockRange step{grid_.num_q_blocks() - rows, grid_.num_q_blocks()};
    int64_t bytes = Stages::score_workspace(score_params(step));
    if (p_.shares == nullptr) bytes = max_of(bytes, Stages::needs_workspace(need_params()));
    if (kAttends) bytes = max_of(bytes, Stages::attention_workspace(attention_params(step)));
    stage_ = take(bytes);
  }

  void check_cap() const {
    PROXYATTN_CHECK(total_bytes_ <= p_.max_workspace_bytes, op_,
                    ": max_workspace_bytes must be at least ", total_bytes_,
                    ", got max_workspace_bytes=", p_.max_workspace_bytes);
  }

  // `tokens` counts the sampled ones of a batch entry.
  TokenStrides proxy_strides(int64_t tokens, int64_t heads) const {
    const int64_t token = heads * p_.head_dim;
    return {tokens * token, token, p_.head_dim};
  }
  TokenStrides q_proxy_strides() const { return proxy_strides(step_queries(), p_.proxy_heads); }
  TokenStrides k_proxy_strides() const {
    return proxy_strides(ceil_div(p_.kv_len, p_.stride), key_proxy_heads());
  }
  // Where the proxy of query 0 would lie if that of `rows`' first query lies where it does.
  const void* first_query_proxy(const BlockRange& rows) const {
    const auto address = reinterpret_cast<std::uintptr_t>(at<void>(q_proxy_));
    const int64_t before = rows.begin * block_queries() * proxy_bytes();
    return reinterpret_cast<const void*>(address - static_cast<std::uintptr_t>(before));
  }

  PoolParams pool_params(const BlockRange& rows) const;
  ScoreParams score_params(const BlockRange& rows) const;
  NeedParams need_params() const;
  SelectParams select_params(const BlockRange& rows) const;
  AttentionParams attention_params(const BlockRange& rows) const;
  int64_t stage_bytes() const { return total_bytes_ - stage_; }

  const char* op_;
  PipelineParams p_;
  BlockGrid grid_;
  bool dense_ = false;
  int64_t rows_per_step_ = 0;
  int64_t total_bytes_ = 0;
  int64_t q_proxy_ = 0, k_proxy_ = 0, needs_ = 0;
  int64_t peak_ = 0, mass_ = 0, indices_ = 0, counts_ = 0, stage_ = 0;
};

template <typename Stages, PipelineJob kJob>
PoolParams Pipeline<Stages, kJob>::pool_params(const BlockRange& rows) const {
  PoolParams s{};
  const int64_t first_query = rows.begin * p_.q_block;
  s.batch = p_.batch;
  s.q_len = min_of(p_.q_len, rows.end * p_.q_block) - first_query;
  // Keys once, with the first step, which is that of the last rows.
  s.kv_len = rows.end == grid_.num_q_blocks() ? p_.kv_len : 0;
  s.q_heads = p_.q_heads;
  s.kv_heads = p_.kv_heads;
  s.proxy_heads = p_.proxy_heads;
  s.head_dim = p_.head_dim;
  s.stride = p_.stride;
  s.q_strides = p_.q_strides;
  s.k_strides = p_.k_strides;
  s.q_proxy_strides = q_proxy_strides();
  s.k_proxy_strides = k_proxy_strides();
  s.q = static_cast<const std::byte*>(p_.q) + first_query * p_.q_strides.token * element_bytes();
  s.k = p_.k;
  s.q_proxy = at<void>(q_proxy_);
  s.k_proxy = at<void>(k_proxy_);
  s.pooling = p_.pooling;
  s.dtype = p_.dtype;
  return s;
}

template <typename Stages, PipelineJob kJob>
ScoreParams Pipeline<Stages, kJob>::score_params(const BlockRange& rows) const {
  ScoreParams s{};
  s.batch = p_.batch;
  s.q_len = p_.q_len;
  s.kv_len = p_.kv_len;
  s.proxy_heads = p_.proxy_heads;
  s.key_proxy_heads = key_proxy_heads();
  s.head_dim = p_.head_dim;
  s.stride = p_.stride;
  s.q_block = p_.q_block;
  s.kv_block = p_.kv_block;
  s.q_offset = p_.q_offset;
  s.window = p_.window;
  s.rows = rows;
  s.q_proxy_strides = q_proxy_strides();
  s.k_proxy_strides = k_proxy_strides();
  s.q_proxy = first_query_proxy(rows);
  s.k_proxy = at<void>(k_proxy_);
  s.peak = at<float>(peak_);
  s.mass = top_p() ? at<float>(mass_) : nullptr;
  s.workspace = at<void>(stage_);
  s.workspace_bytes = stage_bytes();
  s.scale = p_.scale;
  s.causal = p_.causal;
  s.dtype = p_.dtype;
  // Rows that the budgets alone decide: not where lists are the result, nor with top_p, where
  // counts come from the scores.
  s.budgets = kAttends && !top_p() ? at<int32_t>(needs_) : nullptr;
  s.q_heads = p_.q_heads;
  return s;
}

template <typename Stages, PipelineJob kJob>
NeedParams Pipeline<Stages, kJob>::need_params() const {
  NeedParams s{};
  s.batch = p_.batch;
  s.q_len = p_.q_len;
  s.kv_len = p_.kv_len;
  s.q_heads = p_.q_heads;
  s.kv_heads = p_.kv_heads;
  s.head_dim = p_.head_dim;
  s.q_block = p_.q_block;
  s.kv_block = p_.kv_block;
  s.q_offset = p_.q_offset;
  s.window = p_.window;
  s.num_sink_blocks = p_.num_sink_blocks;
  s.num_local_blocks = p_.num_local_blocks;
  s.q_strides = p_.q_strides;
  s.k_strides = p_.k_strides;
  s.q = p_.q;
  s.k = p_.k;
  s.budgets = top_p() ? nullptr : at<int32_t>(needs_);
  s.shares = top_p() ? at<float>(needs_) : nullptr;
  s.workspace = at<void>(stage_);
  s.workspace_bytes = stage_bytes();
  s.gamma = p_.gamma;
  s.scale = p_.scale;
  s.mode = p_.budget_mode;
  s.causal = p_.causal;
  s.dtype = p_.dtype;
  return s;
}

template <typename Stages, PipelineJob kJob>
SelectParams Pipeline<Stages, kJob>::select_params(const BlockRange& rows) const {
  SelectParams s{};
  s.batch = p_.batch;
  s.q_len = p_.q_len;
  s.kv_len = p_.kv_len;
  s.q_heads = p_.q_heads;
  s.proxy_heads = p_.proxy_heads;
  s.q_block = p_.q_block;
  s.kv_block = p_.kv_block;
  s.q_offset = p_.q_offset;
  s.window = p_.window;
  s.min_budget = p_.min_budget;
  s.num_sink_blocks = p_.num_sink_blocks;
  s.num_local_blocks = p_.num_local_blocks;
  s.rows = rows;
  s.list_rows = kAttends ? rows : p_.list_rows;
  s.list_capacity = kAttends ? grid_.num_kv_blocks() : p_.list_capacity;
  s.peak = at<float>(peak_);
  s.mass = top_p() ? at<float>(mass_) : nullptr;
  s.budgets = top_p() ? nullptr : at<int32_t>(needs_);
  if (top_p()) s.shares = p_.shares != nullptr ? p_.shares : at<float>(needs_);
  s.indices = kAttends ? at<int32_t>(indices_) : p_.indices;
  s.counts = kAttends ? at<int32_t>(counts_) : p_.counts;
  s.gamma = p_.gamma;
  s.budget_mode = p_.budget_mode;
  s.causal = p_.causal;
  s.only_prefixes = kAttends;
  return s;
}

template <typename Stages, PipelineJob kJob>
AttentionParams Pipeline<Stages, kJob>::attention_params(const BlockRange& rows) const {
  AttentionParams s{};
  s.batch = p_.batch;
  s.q_len = p_.q_len;
  s.kv_len = p_.kv_len;
  s.q_heads = p_.q_heads;
  s.kv_heads = p_.kv_heads;
  s.head_dim = p_.head_dim;
  s.list_heads = p_.proxy_heads;
  s.list_capacity = grid_.num_kv_blocks();
  s.lse_pitch = p_.lse_pitch;
  s.q_block = p_.q_block;
  s.kv_block = p_.kv_block;
  s.q_offset = p_.q_offset;
  s.window = p_.window;
  s.rows = s.list_rows = rows;
  s.q_strides = p_.q_strides;
  s.k_strides = p_.k_strides;
  s.v_strides = p_.v_strides;
  s.out_strides = p_.out_strides;
  s.q = p_.q;
  s.k = p_.k;
  s.v = p_.v;
  s.indices = dense_ ? nullptr : at<int32_t>(indices_);
  s.counts = dense_ ? nullptr : at<int32_t>(counts_);
  s.sink_logits = p_.sink_logits;
  s.out = p_.out;
  s.lse = p_.lse;
  s.workspace = at<void>(stage_);
  s.workspace_bytes = stage_bytes();
  s.scale = p_.scale;
  s.causal = p_.causal;
  s.lists_are_rankings = !dense_;
  s.dtype = p_.dtype;
  return s;
}

}  // namespace proxyattn
