#include "checks.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "proxyattn/error.h"

#include "common/block_grid.h"
#include "common/half.h"

namespace proxyattn::bench {
namespace {

constexpr int64_t kSampledWindows = 8;   // of pooled tokens at each place
constexpr int64_t kSampledQueries = 16;  // of each sampled query block
constexpr double kLogTolerance = 1e-3;   // of a log-probability, plus as much of its size
constexpr double kMassTolerance = 2e-3;  // of a mass, relative
constexpr double kMassFloor = 1e-6;      // and absolute: masses of a row sum to 1

// Relative L2 distance that rounding in the type allows between two right results.
double output_tolerance(DType dtype) {
  if (dtype == DType::kFloat32) return 1e-5;
  return dtype == DType::kFloat16 ? 1e-3 : 5e-3;
}

std::vector<int64_t> first_and_last(int64_t count) {
  return count == 1 ? std::vector<int64_t>{0} : std::vector<int64_t>{0, count - 1};
}

// The first, the middle and the last of `count` things.
std::vector<int64_t> sample(int64_t count) {
  return count < 3 ? first_and_last(count) : std::vector<int64_t>{0, count / 2, count - 1};
}

using Bytes = std::vector<std::byte>;

const std::byte* shifted(const void* data, int64_t elements, DType dtype) {
  return static_cast<const std::byte*>(data) + elements * element_bytes(dtype);
}

// Tokens [begin, begin + count) of one batch entry, all heads.
Bytes download_tokens(Machine& machine,
                      const void* data,
                      const TokenStrides& strides,
                      DType dtype,
                      int64_t batch_idx,
                      int64_t begin,
                      int64_t count) {
  const int64_t first = batch_idx * strides.batch + begin * strides.token;
  return download(machine, shifted(data, first, dtype),
                  count * strides.token * element_bytes(dtype));
}

float value_at(const Bytes& bytes, int64_t i, DType dtype) {
  const auto* const data = static_cast<const void*>(bytes.data());
  if (dtype == DType::kBFloat16) return to_float(static_cast<const BFloat16*>(data)[i]);
  if (dtype == DType::kFloat16) return to_float(static_cast<const Float16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

Bytes empty_values(int64_t elements, DType dtype) {
  return Bytes(static_cast<std::size_t>(elements * element_bytes(dtype)));
}

// Elements [begin, begin + count) of both.
void compare_outputs(const std::string& what,
                     const Bytes& got,
                     const Bytes& expected,
                     DType dtype,
                     int64_t begin,
                     int64_t count) {
  double distance = 0.0;
  double size = 0.0;
  for (int64_t i = begin; i < begin + count; ++i) {
    const double right = value_at(expected, i, dtype);
    const double difference = value_at(got, i, dtype) - right;
    distance += difference * difference;
    size += right * right;
  }
  const double error = std::sqrt(distance / std::max(size, 1e-30));
  // Written so that a NaN fails.
  if (!(error <= output_tolerance(dtype))) {
    throw WrongResult(join_message(what, " is off by ", error, " of its size"));
  }
}

void compare_values(const std::string& what,
                    const std::vector<float>& got,
                    const std::vector<float>& expected,
                    double absolute,
                    double relative) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double right = expected[i];
    const bool same = got[i] == expected[i];  // infinities too
    if (same || std::abs(got[i] - right) <= absolute + relative * std::abs(right)) continue;
    throw WrongResult(join_message(what, " must be ", right, " at place ", i, ", got ", got[i]));
  }
}

void compare_integers(const std::string& what,
                      const std::vector<int32_t>& got,
                      const std::vector<int32_t>& expected,
                      int32_t slack) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::abs(got[i] - expected[i]) <= slack) continue;
    throw WrongResult(
        join_message(what, " must be ", expected[i], " at place ", i, ", got ", got[i]));
  }
}

// Row `row` of each head of one batch entry of a [batch, heads, rows, width] tensor.
template <typename T>
std::vector<T> download_row(Machine& machine,
                            const T* data,
                            int64_t batch_idx,
                            int64_t heads,
                            int64_t rows,
                            int64_t row,
                            int64_t width) {
  std::vector<T> values;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t place = ((batch_idx * heads + head) * rows + row) * width;
    const std::vector<T> part = download(machine, data + place, width);
    values.insert(values.end(), part.begin(), part.end());
  }
  return values;
}

// One side of the pooling, queries or keys, from window `window` on.
struct PooledPart {
  int64_t window;
  int64_t num_windows;
  int64_t num_tokens;
  Bytes in;
  Bytes got;
  Bytes expected;
};

PooledPart pooled_part(
    Machine& machine, const PoolParams& p, int64_t batch_idx, int64_t window, bool is_key) {
  const int64_t length = is_key ? p.kv_len : p.q_len;
  const TokenStrides& strides = is_key ? p.k_proxy_strides : p.q_proxy_strides;
  PooledPart part;
  part.window = min_of(window, ceil_div(length, p.stride) - 1);
  const int64_t begin = part.window * p.stride;
  part.num_tokens = min_of(kSampledWindows * p.stride, length - begin);
  part.num_windows = ceil_div(part.num_tokens, p.stride);
  part.in = download_tokens(machine, is_key ? p.k : p.q, is_key ? p.k_strides : p.q_strides,
                            p.dtype, batch_idx, begin, part.num_tokens);
  part.got = download_tokens(machine, is_key ? p.k_proxy : p.q_proxy, strides, p.dtype, batch_idx,
                             part.window, part.num_windows);
  part.expected = empty_values(part.num_windows * strides.token, p.dtype);
  return part;
}

}  // namespace

void check_pool(Machine& machine, const PoolParams& params) {
  for (const int64_t batch_idx : first_and_last(params.batch)) {
    for (const int64_t window : sample(ceil_div(params.kv_len, params.stride))) {
      PooledPart q = pooled_part(machine, params, batch_idx, window, /*is_key=*/false);
      PooledPart k = pooled_part(machine, params, batch_idx, window, /*is_key=*/true);
      PoolParams host = params;
      host.batch = 1;
      host.q_len = q.num_tokens;
      host.kv_len = k.num_tokens;
      host.q = q.in.data();
      host.k = k.in.data();
      host.q_proxy = q.expected.data();
      host.k_proxy = k.expected.data();
      cpu::pool_heads(host);
      compare_outputs("q_proxy", q.got, q.expected, params.dtype, 0,
                      q.num_windows * params.q_proxy_strides.token);
      compare_outputs("k_proxy", k.got, k.expected, params.dtype, 0,
                      k.num_windows * params.k_proxy_strides.token);
    }
  }
}

void check_score(Machine& machine, const ScoreParams& params) {
  const int64_t num_rows = params.rows.end - params.rows.begin;
  const int64_t width = ceil_div(params.kv_len, params.kv_block);
  for (const int64_t batch_idx : first_and_last(params.batch)) {
    const Bytes q_proxy =
        download_tokens(machine, params.q_proxy, params.q_proxy_strides, params.dtype, batch_idx, 0,
                        ceil_div(params.q_len, params.stride));
    const Bytes k_proxy =
        download_tokens(machine, params.k_proxy, params.k_proxy_strides, params.dtype, batch_idx, 0,
                        ceil_div(params.kv_len, params.stride));
    for (const int64_t row : sample(num_rows)) {
      std::vector<float> peak(static_cast<std::size_t>(params.proxy_heads * width));
      std::vector<float> mass(params.mass == nullptr ? 0 : peak.size());
      ScoreParams host = params;
      host.batch = 1;
      host.rows = {params.rows.begin + row, params.rows.begin + row + 1};
      host.q_proxy = q_proxy.data();
      host.k_proxy = k_proxy.data();
      host.peak = peak.data();
      host.mass = params.mass == nullptr ? nullptr : mass.data();
      host.workspace_bytes = cpu::score_blocks_workspace_bytes(host);
      Bytes workspace(static_cast<std::size_t>(host.workspace_bytes));
      host.workspace = workspace.data();
      cpu::score_blocks(host);
      compare_values("peak",
                     download_row<float>(machine, params.peak, batch_idx, params.proxy_heads,
                                         num_rows, row, width),
                     peak, kLogTolerance, kLogTolerance);
      if (params.mass == nullptr) continue;
      compare_values("mass",
                     download_row<float>(machine, params.mass, batch_idx, params.proxy_heads,
                                         num_rows, row, width),
                     mass, kMassFloor, kMassTolerance);
    }
  }
}

void check_needs(Machine& machine, const NeedParams& params) {
  const int64_t group = params.q_heads / params.kv_heads;
  const int64_t num_queries = min_of(params.q_block, params.q_len);
  const int64_t begin = params.q_len - num_queries;
  for (const int64_t batch_idx : first_and_last(params.batch)) {
    const Bytes q = download_tokens(machine, params.q, params.q_strides, params.dtype, batch_idx,
                                    begin, num_queries);
    const Bytes k = download_tokens(machine, params.k, params.k_strides, params.dtype, batch_idx, 0,
                                    params.kv_len);
    for (const int64_t kv_head : first_and_last(params.kv_heads)) {
      std::vector<int32_t> budgets(static_cast<std::size_t>(group));
      std::vector<float> shares(static_cast<std::size_t>(group));
      NeedParams host = params;
      host.batch = 1;
      host.q_len = num_queries;
      host.q_offset = params.q_offset + begin;
      host.q_heads = group;
      host.kv_heads = 1;
      host.q = shifted(q.data(), kv_head * group * params.q_strides.head, params.dtype);
      host.k = shifted(k.data(), kv_head * params.k_strides.head, params.dtype);
      host.budgets = budgets.data();
      host.shares = shares.data();
      host.workspace_bytes = cpu::estimate_needs_workspace_bytes(host);
      Bytes workspace(static_cast<std::size_t>(host.workspace_bytes));
      host.workspace = workspace.data();
      cpu::estimate_needs(host);
      const int64_t first = batch_idx * params.q_heads + kv_head * group;
      if (params.mode == BudgetMode::kTopP) {
        compare_values("shares", download<float>(machine, params.shares + first, group), shares,
                       kMassFloor, kMassTolerance);
      } else {
        // A sum that meets gamma within rounding may fall on either side of it.
        compare_integers("budgets", download<int32_t>(machine, params.budgets + first, group),
                         budgets, /*slack=*/1);
      }
    }
  }
}

void check_select(Machine& machine, const SelectParams& params) {
  const int64_t num_rows = params.rows.end - params.rows.begin;
  const int64_t num_list_rows = params.list_rows.end - params.list_rows.begin;
  const int64_t width = ceil_div(params.kv_len, params.kv_block);
  const bool top_p = params.budget_mode == BudgetMode::kTopP;
  const auto scores_of = [&](const float* scores, int64_t batch_idx, int64_t row) {
    return download_row(machine, scores, batch_idx, params.proxy_heads, num_rows, row, width);
  };
  const auto needs_of = [&](const auto* needs, int64_t batch_idx) {
    return download(machine, needs + batch_idx * params.q_heads, params.q_heads);
  };
  for (const int64_t batch_idx : first_and_last(params.batch)) {
    const auto budgets = top_p ? std::vector<int32_t>{} : needs_of(params.budgets, batch_idx);
    const auto shares = top_p ? needs_of(params.shares, batch_idx) : std::vector<float>{};
    for (const int64_t row : sample(num_rows)) {
      const std::vector<float> peak = scores_of(params.peak, batch_idx, row);
      const std::vector<float> mass =
          top_p ? scores_of(params.mass, batch_idx, row) : std::vector<float>{};
      std::vector<int32_t> indices(
          static_cast<std::size_t>(params.proxy_heads * params.list_capacity));
      std::vector<int32_t> counts(static_cast<std::size_t>(params.q_heads));
      SelectParams host = params;
      host.batch = 1;
      host.rows = {params.rows.begin + row, params.rows.begin + row + 1};
      host.list_rows = host.rows;
      host.peak = peak.data();
      host.mass = top_p ? mass.data() : nullptr;
      host.budgets = budgets.data();
      host.shares = shares.data();
      host.indices = indices.data();
      host.counts = counts.data();
      cpu::select_blocks(host);
      const int64_t list_row = host.rows.begin - params.list_rows.begin;
      const int32_t* const got_indices = params.indices;
      const int32_t* const got_counts = params.counts;
      compare_integers("indices",
                       download_row(machine, got_indices, batch_idx, params.proxy_heads,
                                    num_list_rows, list_row, params.list_capacity),
                       indices, /*slack=*/0);
      // A sum that meets what is needed within rounding may do so one block earlier or later.
      compare_integers("counts",
                       download_row(machine, got_counts, batch_idx, params.q_heads, num_list_rows,
                                    list_row, /*width=*/1),
                       counts, /*slack=*/top_p ? 1 : 0);
    }
  }
}

namespace {

// The queries of one block that are checked: its first ones in the middle of the sequence, its last
// ones at both ends.
struct QuerySample {
  int64_t row;    // query block, counted from the first of the call
  int64_t begin;  // first query
  int64_t count;
};

QuerySample sampled_queries(const AttentionParams& p, int64_t row) {
  const int64_t num_rows = p.rows.end - p.rows.begin;
  const int64_t begin = (p.rows.begin + row) * p.q_block;
  const int64_t end = min_of(begin + p.q_block, p.q_len);
  const int64_t count = min_of(kSampledQueries, end - begin);
  const bool at_end = row == 0 || row == num_rows - 1;
  return {row, at_end ? end - count : begin, count};
}

// One row of lists for each query head of a kv head; empty when all blocks are read.
struct HostLists {
  std::vector<int32_t> indices;
  std::vector<int32_t> counts;
};

HostLists download_lists(
    Machine& machine, const AttentionParams& p, int64_t row, int64_t batch_idx, int64_t kv_head) {
  HostLists lists;
  if (p.indices == nullptr) return lists;
  const int64_t num_rows = p.list_rows.end - p.list_rows.begin;
  const int64_t list_row = p.rows.begin + row - p.list_rows.begin;
  const int64_t group = p.q_heads / p.kv_heads;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int64_t list = batch_idx * p.list_heads + head / (p.q_heads / p.list_heads);
    const int32_t* const entries = p.indices + (list * num_rows + list_row) * p.list_capacity;
    const auto row_entries = download(machine, entries, p.list_capacity);
    lists.indices.insert(lists.indices.end(), row_entries.begin(), row_entries.end());
    const int64_t count_row = (batch_idx * p.q_heads + head) * num_rows + list_row;
    lists.counts.push_back(download(machine, p.counts + count_row, 1)[0]);
  }
  return lists;
}

// A host-side call over a few queries and the query heads of one kv head.
void check_attention_of(Machine& machine,
                        const AttentionParams& params,
                        const QuerySample& queries,
                        int64_t batch_idx,
                        int64_t kv_head,
                        const Bytes& k,
                        const Bytes& v) {
  const int64_t group = params.q_heads / params.kv_heads;
  const int64_t first_head = kv_head * group;
  const Bytes q = download_tokens(machine, params.q, params.q_strides, params.dtype, batch_idx,
                                  queries.begin, queries.count);
  const Bytes got = download_tokens(machine, params.out, params.out_strides, params.dtype,
                                    batch_idx, queries.begin, queries.count);
  Bytes expected = empty_values(queries.count * params.out_strides.token, params.dtype);

  AttentionParams host = params;
  host.batch = 1;
  host.q_len = queries.count;
  host.q_offset = params.q_offset + queries.begin;
  host.rows = host.list_rows = {0, 1};
  host.lse_pitch = queries.count;
  host.q_heads = group;
  host.kv_heads = 1;
  host.q = shifted(q.data(), first_head * params.q_strides.head, params.dtype);
  host.k = shifted(k.data(), kv_head * params.k_strides.head, params.dtype);
  host.v = shifted(v.data(), kv_head * params.v_strides.head, params.dtype);
  const int64_t out_head = first_head * params.out_strides.head;
  host.out = expected.data() + out_head * element_bytes(params.dtype);

  std::vector<float> lse(static_cast<std::size_t>(group * queries.count));
  host.lse = params.lse == nullptr ? nullptr : lse.data();
  const HostLists lists = download_lists(machine, params, queries.row, batch_idx, kv_head);
  if (params.indices != nullptr) {
    host.list_heads = group;
    host.indices = lists.indices.data();
    host.counts = lists.counts.data();
  }
  host.workspace_bytes = cpu::block_sparse_attention_workspace_bytes(host);
  Bytes workspace(static_cast<std::size_t>(host.workspace_bytes));
  host.workspace = workspace.data();
  cpu::block_sparse_attention(host);

  for (int64_t i = 0; i < queries.count; ++i) {
    compare_outputs(join_message("out of query ", queries.begin + i, ", kv head ", kv_head), got,
                    expected, params.dtype, i * params.out_strides.token + out_head,
                    group * params.head_dim);
  }
  if (params.lse == nullptr) return;
  std::vector<float> got_lse;
  for (int64_t head = first_head; head < first_head + group; ++head) {
    const int64_t place = (batch_idx * params.q_heads + head) * params.q_len + queries.begin;
    const auto part = download<float>(machine, params.lse + place, queries.count);
    got_lse.insert(got_lse.end(), part.begin(), part.end());
  }
  compare_values("lse", got_lse, lse, kLogTolerance, kLogTolerance);
}

}  // namespace

void check_attention(Machine& machine, const AttentionParams& params) {
  for (const int64_t batch_idx : first_and_last(params.batch)) {
    const Bytes k = download_tokens(machine, params.k, params.k_strides, params.dtype, batch_idx, 0,
                                    params.kv_len);
    const Bytes v = download_tokens(machine, params.v, params.v_strides, params.dtype, batch_idx, 0,
                                    params.kv_len);
    for (const int64_t row : sample(params.rows.end - params.rows.begin)) {
      for (const int64_t kv_head : first_and_last(params.kv_heads)) {
        check_attention_of(machine, params, sampled_queries(params, row), batch_idx, kv_head, k, v);
      }
    }
  }
}

}  // namespace proxyattn::bench
