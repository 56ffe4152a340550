#include "common/validate.h"

#include <cmath>
#include <cstdint>
#include <string>

#include "proxyattn/error.h"

#include "common/math.h"

namespace proxyattn {
namespace {

template <std::size_t Count>
bool contains(const int64_t (&values)[Count], int64_t value) {
  for (const int64_t v : values) {
    if (v == value) return true;
  }
  return false;
}

template <std::size_t Count>
std::string list_of(const int64_t (&values)[Count]) {
  std::string text;
  for (const int64_t v : values) {
    if (!text.empty()) text += ", ";
    text += std::to_string(v);
  }
  return text;
}

void check_lengths(const char* op, int64_t batch, int64_t q_len, int64_t kv_len) {
  PROXYATTN_CHECK(batch >= 0, op, ": batch must be at least 0, got batch=", batch);
  PROXYATTN_CHECK(q_len >= 0, op, ": q_len must be at least 0, got q_len=", q_len);
  PROXYATTN_CHECK(kv_len >= 0, op, ": kv_len must be at least 0, got kv_len=", kv_len);
}

// Packed sequences as a caller hands them over; the stages that an op is made of know more.
template <typename Params>
void check_packed(const char* op, const Params& p) {
  if (p.packed.q_starts == nullptr) return;
  PROXYATTN_CHECK(p.q_len >= 1, op,
                  ": max_seqlen_q must be at least 1, got max_seqlen_q=", p.q_len);
  PROXYATTN_CHECK(p.kv_len >= 1, op,
                  ": max_seqlen_k must be at least 1, got max_seqlen_k=", p.kv_len);
  validate_key_places(p.packed, op);
  PROXYATTN_CHECK(p.packed.page_table == nullptr || contains(kPageSizes, p.packed.page_len), op,
                  ": pages of k must hold one of ", list_of(kPageSizes),
                  " tokens, got k.size(1)=", p.packed.page_len);
}

void check_heads(const char* op, int64_t q_heads, int64_t kv_heads) {
  PROXYATTN_CHECK(q_heads >= 1, op, ": q_heads must be at least 1, got q_heads=", q_heads);
  PROXYATTN_CHECK(kv_heads >= 1, op, ": kv_heads must be at least 1, got kv_heads=", kv_heads);
  PROXYATTN_CHECK(q_heads % kv_heads == 0, op,
                  ": kv_heads must divide q_heads, got q_heads=", q_heads, ", kv_heads=", kv_heads);
}

void check_proxy_heads(const char* op, int64_t proxy_heads, int64_t q_heads, int64_t kv_heads) {
  const bool divides = proxy_heads >= 1 && kv_heads % proxy_heads == 0;
  const bool multiple =
      proxy_heads >= 1 && proxy_heads % kv_heads == 0 && q_heads % proxy_heads == 0;
  PROXYATTN_CHECK(divides || multiple, op,
                  ": num_proxy_heads must divide kv_heads or be a multiple of it that divides "
                  "q_heads, got num_proxy_heads=",
                  proxy_heads, ", kv_heads=", kv_heads, ", q_heads=", q_heads);
}

void check_head_dim(const char* op, int64_t head_dim) {
  PROXYATTN_CHECK(contains(kHeadDims, head_dim), op, ": head_dim must be one of ",
                  list_of(kHeadDims), ", got head_dim=", head_dim);
}

void check_block_size(const char* op, int64_t block_size) {
  PROXYATTN_CHECK(contains(kBlockSizes, block_size), op, ": block_size must be one of ",
                  list_of(kBlockSizes), ", got block_size=", block_size);
}

void check_stride(const char* op, int64_t stride) {
  PROXYATTN_CHECK(contains(kStrides, stride), op, ": stride must be one of ", list_of(kStrides),
                  ", got stride=", stride);
}

void check_scale(const char* op, float scale) {
  PROXYATTN_CHECK(std::isfinite(scale) && scale > 0.0f, op,
                  ": scale must be finite and positive, got scale=", scale);
}

void check_gamma(const char* op, double gamma) {
  PROXYATTN_CHECK(!std::isnan(gamma), op, ": gamma must be a number, got gamma=nan");
}

template <typename Params>
void check_rows(const char* op, const Params& p) {
  const BlockRange& rows = p.rows;
  const int64_t num_q_blocks = p.packed.q_starts == nullptr
                                   ? ceil_div(p.q_len, p.q_block)
                                   : max_packed_blocks(p.packed, p.batch, p.q_block);
  PROXYATTN_CHECK(0 <= rows.begin && rows.begin <= rows.end && rows.end <= num_q_blocks, op,
                  ": rows must be a range of query blocks in [0, ", num_q_blocks, "], got [",
                  rows.begin, ", ", rows.end, ")");
}

// Lists may hold the query blocks of other sequences too, before and behind these.
void check_list_rows(const char* op, const BlockRange& list_rows, const BlockRange& rows) {
  PROXYATTN_CHECK(list_rows.begin <= rows.begin && rows.end <= list_rows.end, op,
                  ": rows must lie in list_rows, got [", rows.begin, ", ", rows.end, ") and [",
                  list_rows.begin, ", ", list_rows.end, ")");
}

void check_list_capacity(const char* op, const SelectParams& p) {
  const bool writes_lists = p.rows.begin < p.rows.end;
  const int64_t num_blocks = ceil_div(p.kv_len, p.kv_block);
  PROXYATTN_CHECK(!writes_lists || p.list_capacity >= num_blocks, op,
                  ": list_capacity must be at least the number of key blocks, ", num_blocks,
                  ", got list_capacity=", p.list_capacity);
}

void check_min_budget(const char* op, int64_t min_budget) {
  PROXYATTN_CHECK(min_budget >= 0, op,
                  ": min_budget must be at least 0, got min_budget=", min_budget);
}

void check_forced(const char* op, int64_t num_sink_blocks, int64_t num_local_blocks) {
  PROXYATTN_CHECK(num_sink_blocks >= 0, op,
                  ": num_sink_blocks must be at least 0, got num_sink_blocks=", num_sink_blocks);
  PROXYATTN_CHECK(num_local_blocks >= 0, op,
                  ": num_local_blocks must be at least 0, got num_local_blocks=", num_local_blocks);
}

}  // namespace

void validate_aligned_lengths(const char* op, int64_t q_len, int64_t kv_len, bool causal) {
  PROXYATTN_CHECK(!causal || q_len <= kv_len, op,
                  ": q_len must be at most kv_len when causal, got q_len=", q_len,
                  ", kv_len=", kv_len);
}

void validate_prepared(const char* op, const PackedSequences& packed) {
  PROXYATTN_CHECK(packed.q_starts == nullptr || packed.table != nullptr, op,
                  ": packed sequences must have been prepared, got no table of them");
}

void validate_not_packed(const char* op, const PackedSequences& packed) {
  PROXYATTN_CHECK(packed.q_starts == nullptr, op,
                  ": sequences must be a batch on a CPU, got packed ones");
}

void validate_key_places(const PackedSequences& packed, const char* op) {
  const bool paged = packed.page_table != nullptr;
  PROXYATTN_CHECK(paged != (packed.kv_starts != nullptr), op,
                  ": one of cu_seqlens_k and block_table must be given, got ",
                  paged ? "both" : "neither");
  PROXYATTN_CHECK(!paged || packed.kv_lens != nullptr, op,
                  ": seqused_k must be given with block_table, got None");
}

void validate_pool(const PoolParams& p, const char* op) {
  check_lengths(op, p.batch, p.q_len, p.kv_len);
  check_heads(op, p.q_heads, p.kv_heads);
  check_proxy_heads(op, p.proxy_heads, p.q_heads, p.kv_heads);
  check_head_dim(op, p.head_dim);
  check_stride(op, p.stride);
}

void validate_score(const ScoreParams& p, const char* op) {
  check_lengths(op, p.batch, p.q_len, p.kv_len);
  PROXYATTN_CHECK(p.proxy_heads >= 1, op,
                  ": num_proxy_heads must be at least 1, got num_proxy_heads=", p.proxy_heads);
  PROXYATTN_CHECK(p.key_proxy_heads >= 1 && p.proxy_heads % p.key_proxy_heads == 0, op,
                  ": k_proxy must have heads that divide those of q_proxy, got k_proxy.size(2)=",
                  p.key_proxy_heads, ", q_proxy.size(2)=", p.proxy_heads);
  check_head_dim(op, p.head_dim);
  check_stride(op, p.stride);
  check_block_size(op, p.q_block);
  check_block_size(op, p.kv_block);
  check_scale(op, p.scale);
  check_rows(op, p);
}

const char* needs_op(const NeedParams& p) {
  return p.mode == BudgetMode::kLastBlock ? "estimate_budgets" : "estimate_shares";
}

void validate_needs(const NeedParams& p) {
  const char* op = needs_op(p);
  check_lengths(op, p.batch, p.q_len, p.kv_len);
  check_heads(op, p.q_heads, p.kv_heads);
  check_head_dim(op, p.head_dim);
  check_block_size(op, p.q_block);
  check_block_size(op, p.kv_block);
  check_scale(op, p.scale);
  if (p.mode == BudgetMode::kLastBlock) {
    check_gamma(op, p.gamma);
  } else {
    check_forced(op, p.num_sink_blocks, p.num_local_blocks);
  }
}

void validate_select(const SelectParams& p, const char* op) {
  check_lengths(op, p.batch, p.q_len, p.kv_len);
  PROXYATTN_CHECK(p.proxy_heads >= 1 && p.q_heads % p.proxy_heads == 0, op,
                  ": num_proxy_heads must divide q_heads, got num_proxy_heads=", p.proxy_heads,
                  ", q_heads=", p.q_heads);
  check_block_size(op, p.q_block);
  check_block_size(op, p.kv_block);
  check_gamma(op, p.gamma);
  check_min_budget(op, p.min_budget);
  check_forced(op, p.num_sink_blocks, p.num_local_blocks);
  check_rows(op, p);
  check_list_rows(op, p.list_rows, p.rows);
  check_list_capacity(op, p);
}

const char* attention_op(const AttentionParams& p) {
  const bool packed = p.packed.q_starts != nullptr;
  return packed ? "block_sparse_attention_varlen" : "block_sparse_attention";
}

void validate_attention(const AttentionParams& p, const char* op) {
  check_packed(op, p);
  check_lengths(op, p.batch, p.q_len, p.kv_len);
  check_heads(op, p.q_heads, p.kv_heads);
  check_head_dim(op, p.head_dim);
  check_block_size(op, p.q_block);
  check_block_size(op, p.kv_block);
  check_scale(op, p.scale);
  check_rows(op, p);
  check_list_rows(op, p.list_rows, p.rows);
  PROXYATTN_CHECK(p.list_heads >= 1 && p.q_heads % p.list_heads == 0, op,
                  ": indices must hold lists for a number of heads that divides q_heads, got "
                  "indices.size(",
                  p.packed.q_starts == nullptr ? 1 : 0, ")=", p.list_heads,
                  ", q_heads=", p.q_heads);
}

void validate_pipeline(const PipelineParams& p, const char* op) {
  check_packed(op, p);
  check_lengths(op, p.batch, p.q_len, p.kv_len);
  check_heads(op, p.q_heads, p.kv_heads);
  check_proxy_heads(op, p.proxy_heads, p.q_heads, p.kv_heads);
  check_head_dim(op, p.head_dim);
  check_stride(op, p.stride);
  check_block_size(op, p.q_block);
  check_block_size(op, p.kv_block);
  check_scale(op, p.scale);
  check_gamma(op, p.gamma);
  check_min_budget(op, p.min_budget);
  check_forced(op, p.num_sink_blocks, p.num_local_blocks);
  PROXYATTN_CHECK(p.shares == nullptr || p.budget_mode == BudgetMode::kTopP, op,
                  ": shares must be None with budget_mode 'last_block', got a tensor");
}

void validate_workspace(const char* op, const void* workspace, int64_t got, int64_t needed) {
  PROXYATTN_CHECK(got >= needed && (needed == 0 || workspace != nullptr), op,
                  ": workspace must hold ", needed, " bytes, got ", workspace == nullptr ? 0 : got);
}

}  // namespace proxyattn
