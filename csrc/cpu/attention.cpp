// Stage 5 on the CPU: a task takes one query block of a few heads that share their keys and their
// list of key blocks. Every listed block is brought into fp32 tiles once and met by each head whose
// count reaches it, in list order, with the online softmax; a head's queries and outputs are held
// as panels (see simd/kernels.h). No sum depends on how heads are grouped or on threads.
#include "proxyattn/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "proxyattn/device.h"
#include "proxyattn/error.h"

#include "common/block_grid.h"
#include "common/sharing.h"
#include "common/validate.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/sequences.h"
#include "cpu/stages.h"
#include "cpu/tiles.h"

namespace proxyattn::cpu {
namespace {

constexpr int64_t kMaxBlock = 128;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Heads of one task. Seven heads together take 6 % less time than one by one (Zen 3, head_dim 128);
// more would only leave the caches.
constexpr int64_t kMaxTaskHeads = 8;
// Tasks that each thread should get, so that all end at about the same time.
constexpr int64_t kMinTasksPerThread = 4;

// Heads of one task, all of which read the same keys and the same list: as many as leave enough
// tasks.
int64_t heads_per_task(const AttentionParams& p) {
  const int64_t sharing = heads_sharing_list(p);
  const int64_t single_head_tasks = p.batch * p.q_heads * (p.rows.end - p.rows.begin);
  for (int64_t heads = kMaxTaskHeads; heads > 1; --heads) {
    const bool enough = single_head_tasks >= heads * kMinTasksPerThread * num_threads();
    if (sharing % heads == 0 && enough) return heads;
  }
  return 1;
}

// One head's state between key blocks.
struct HeadState {
  float* queries;  // panels
  float* out;      // panels, not yet divided by sum
  float* top;      // [kMaxBlock] largest score so far
  double* sum;     // [kMaxBlock] of exp(score - top)
};

struct Scratch {
  HeadState heads[kMaxTaskHeads];
  float* keys;    // [kMaxTileKeys][head_dim]
  float* values;  // [kMaxTileKeys][head_dim]
  float* packed_values;
  float* scores;  // [kMaxTileKeys][panel]

  Scratch(ScratchLayout& layout, const AttentionParams& p) {
    for (HeadState& head : heads) {
      head.queries = layout.take<float>(kMaxBlock * p.head_dim);
      head.out = layout.take<float>(kMaxBlock * p.head_dim);
      head.top = layout.take<float>(kMaxBlock);
      head.sum = layout.take<double>(kMaxBlock);
    }
    keys = layout.take<float>(kMaxTileKeys * p.head_dim);
    values = layout.take<float>(kMaxTileKeys * p.head_dim);
    packed_values = layout.take<float>(kMaxTileKeys * p.head_dim);
    scores = layout.take<float>(kMaxTileKeys * kMaxPanel);
  }
};

int64_t scratch_bytes(const AttentionParams& p) {
  ScratchLayout layout;
  Scratch(layout, p);
  return layout.bytes();
}

void check_lists(const AttentionParams& p, const char* op) {
  const int64_t num_rows = p.list_rows.end - p.list_rows.begin;
  const int64_t heads_per_list = p.q_heads / p.list_heads;
  const int64_t num_blocks = ceil_div(p.kv_len, p.kv_block);
  for (int64_t list = 0; list < p.batch * p.list_heads; ++list) {
    for (int64_t m = p.rows.begin; m < p.rows.end; ++m) {
      const int64_t row = m - p.list_rows.begin;
      int64_t longest = 0;
      for (int64_t head = list * heads_per_list; head < (list + 1) * heads_per_list; ++head) {
        const int64_t count = p.counts[head * num_rows + row];
        PROXYATTN_CHECK(0 <= count && count <= p.list_capacity, op, ": counts must be in [0, ",
                        p.list_capacity, "], the lists' capacity, got ", count);
        longest = max_of(longest, count);
      }
      const int32_t* entries = p.indices + (list * num_rows + row) * p.list_capacity;
      for (int64_t i = 0; i < longest; ++i) {
        PROXYATTN_CHECK(0 <= entries[i] && entries[i] < num_blocks, op,
                        ": indices must name key blocks in [0, ", num_blocks, "), got ",
                        entries[i]);
      }
    }
  }
}

// Those of `rows`, of all sequences, that are query blocks of this one, by its own numbers.
BlockRange rows_among(const BlockRange& rows, int64_t first, const AttentionParams& sequence) {
  const int64_t count = ceil_div(sequence.q_len, sequence.q_block);
  const auto own = [&](int64_t row) { return min_of(max_of<int64_t>(row - first, 0), count); };
  return {own(rows.begin), own(rows.end)};
}

// A query block of neighbouring heads of one batch entry, and what they read.
struct Task {
  int64_t batch;
  int64_t first_head;
  int64_t m;
  int64_t num_rows;
  int64_t visible;         // key blocks
  const int32_t* entries;  // null: block i is entry i
  int64_t counts[kMaxTaskHeads];
};

class Attender {
 public:
  explicit Attender(const AttentionParams& params)
      : p_(params),
        kernels_(kernels()),
        grid_{p_.q_len, p_.kv_len, p_.q_block, p_.kv_block, p_.q_offset, p_.causal},
        task_heads_(heads_per_task(p_)),
        scratch_bytes_(scratch_bytes(p_)) {}

  void run() const {
    const int64_t num_rows = p_.rows.end - p_.rows.begin;
    const int64_t num_units = p_.batch * p_.q_heads / task_heads_;
    // The heads' last query blocks see the most and go first.
    parallel_for(num_units * num_rows, num_workers(work()), [&](int64_t idx, int worker) {
      ScratchLayout layout(static_cast<std::byte*>(p_.workspace) + worker * scratch_bytes_);
      const Scratch scratch(layout, p_);
      const Task task = make_task(idx / num_rows, p_.rows.end - 1 - idx % num_rows);
      attend(task, scratch);
    });
  }

 private:
  double work() const {
    const int64_t num_rows = p_.rows.end - p_.rows.begin;
    double num_blocks = 0.0;
    if (p_.indices == nullptr) {
      for (int64_t m = p_.rows.begin; m < p_.rows.end; ++m) {
        num_blocks += static_cast<double>(p_.batch * p_.q_heads * grid_.visible(m));
      }
    } else {
      for (int64_t head = 0; head < p_.batch * p_.q_heads; ++head) {
        const int32_t* counts = p_.counts + list_row(head, p_.rows.begin);
        for (int64_t i = 0; i < num_rows; ++i) num_blocks += counts[i];
      }
    }
    return num_blocks * static_cast<double>(2 * p_.q_block * p_.kv_block * p_.head_dim);
  }

  // Row of query block m in a [heads or lists, list_rows] tensor.
  int64_t list_row(int64_t head, int64_t m) const {
    return head * (p_.list_rows.end - p_.list_rows.begin) + m - p_.list_rows.begin;
  }

  Task make_task(int64_t unit, int64_t m) const {
    const int64_t head = unit * task_heads_;  // over the whole batch
    Task task{};
    task.batch = head / p_.q_heads;
    task.first_head = head % p_.q_heads;
    task.m = m;
    task.num_rows = min_of(p_.q_block, p_.q_len - m * p_.q_block);
    task.visible = grid_.visible(m);
    if (p_.indices != nullptr) {
      const int64_t list = head / (p_.q_heads / p_.list_heads);
      task.entries = p_.indices + list_row(list, m) * p_.list_capacity;
    }
    for (int64_t i = 0; i < task_heads_; ++i) {
      task.counts[i] = p_.indices == nullptr ? task.visible : p_.counts[list_row(head + i, m)];
    }
    return task;
  }

  void attend(const Task& task, const Scratch& scratch) const {
    for (int64_t i = 0; i < task_heads_; ++i) begin_head(task, i, scratch.heads[i]);
    const int64_t longest = *std::max_element(task.counts, task.counts + task_heads_);
    for (int64_t entry = 0; entry < longest; ++entry) {
      const int64_t n = task.entries == nullptr ? entry : task.entries[entry];
      if (n >= task.visible) continue;  // a list may name blocks that lie behind every query
      load_block(task, n, scratch);
      for (int64_t i = 0; i < task_heads_; ++i) {
        if (entry < task.counts[i]) visit_block(task, n, scratch.heads[i], scratch);
      }
    }
    for (int64_t i = 0; i < task_heads_; ++i) finish_head(task, i, scratch.heads[i]);
  }

  void begin_head(const Task& task, int64_t i, const HeadState& head) const {
    const HeadRows rows = head_rows(p_.q, p_.q_strides, p_.dtype, task.batch, task.first_head + i,
                                    task.m * p_.q_block);
    load_panels(kernels_, rows, task.num_rows, p_.head_dim, p_.scale, head.queries);
    std::fill_n(head.out, round_up(task.num_rows, kernels_.panel) * p_.head_dim, 0.0f);
    std::fill_n(head.top, kMaxBlock, kMinusInf);
    std::fill_n(head.sum, kMaxBlock, 0.0);
  }

  int64_t keys_in(int64_t n) const { return min_of(p_.kv_block, p_.kv_len - n * p_.kv_block); }

  void load_block(const Task& task, int64_t n, const Scratch& scratch) const {
    const int64_t kv_head = task.first_head / (p_.q_heads / p_.kv_heads);
    const int64_t token = n * p_.kv_block;
    const HeadRows keys = head_rows(p_.k, p_.k_strides, p_.dtype, task.batch, kv_head, token);
    const HeadRows values = head_rows(p_.v, p_.v_strides, p_.dtype, task.batch, kv_head, token);
    load_rows(kernels_, keys, keys_in(n), p_.head_dim, scratch.keys);
    load_rows(kernels_, values, keys_in(n), p_.head_dim, scratch.values);
    kernels_.pack_values(scratch.values, keys_in(n), p_.head_dim, scratch.packed_values);
  }

  void visit_block(const Task& task,
                   int64_t n,
                   const HeadState& head,
                   const Scratch& scratch) const {
    const int64_t block_keys = keys_in(n);
    const int64_t before = grid_.first_position(task.m) - n * p_.kv_block;
    // Keys of the block that a row sees.
    const auto seen = [&](int64_t row) {
      if (!p_.causal) return block_keys;
      return max_of<int64_t>(0, min_of(before + row + 1, block_keys));
    };
    for (int64_t row = 0; row < task.num_rows; row += kernels_.panel) {
      const int64_t last_row = min_of(row + kernels_.panel, task.num_rows) - 1;
      const int64_t num_keys = seen(last_row);
      if (num_keys == 0) continue;
      kernels_.scores(head.queries + row * p_.head_dim, scratch.keys, num_keys, p_.head_dim,
                      scratch.scores);
      if (seen(row) < num_keys) {
        int32_t num_seen[kMaxPanel];
        for (int64_t lane = 0; lane < kernels_.panel; ++lane) {
          num_seen[lane] = static_cast<int32_t>(seen(min_of(row + lane, last_row)));
        }
        kernels_.mask(num_seen, num_keys, scratch.scores);
      }
      float decay[kMaxPanel];
      kernels_.softmax_step(num_keys, scratch.scores, head.top + row, head.sum + row, decay);
      kernels_.accumulate(scratch.packed_values, scratch.scores, decay, num_keys, p_.head_dim,
                          head.out + row * p_.head_dim);
    }
  }

  void finish_head(const Task& task, int64_t i, const HeadState& head) const {
    const int64_t q_head = task.first_head + i;
    float out_row[kMaxHeadDim];
    for (int64_t row = 0; row < task.num_rows; ++row) {
      const int64_t token = task.m * p_.q_block + row;
      const double sum = head.sum[row];
      const float inverse = sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum);
      const float* lane =
          head.out + row / kernels_.panel * kernels_.panel * p_.head_dim + row % kernels_.panel;
      for (int64_t d = 0; d < p_.head_dim; ++d) out_row[d] = lane[d * kernels_.panel] * inverse;
      const int64_t offset = task.batch * p_.out_strides.batch + token * p_.out_strides.token +
                             q_head * p_.out_strides.head;
      kernels_.narrow(p_.dtype, out_row, p_.head_dim, element_at(p_.out, offset, p_.dtype));
      if (p_.lse != nullptr) {
        p_.lse[(task.batch * p_.q_heads + q_head) * p_.lse_pitch + token] =
            static_cast<float>(static_cast<double>(head.top[row]) + std::log(sum));
      }
    }
  }

  const AttentionParams& p_;
  const Kernels& kernels_;
  const BlockGrid grid_;
  const int64_t task_heads_;
  const int64_t scratch_bytes_;
};

}  // namespace

int64_t block_sparse_attention_workspace_bytes(const AttentionParams& params) {
  validate_attention(params, attention_op(params));
  return 2 * gathered_bytes(params) + scratch_bytes(params) * num_threads();
}

void run_attention(const AttentionParams& params) {
  const char* op = attention_op(params);
  validate_workspace(op, params.workspace, params.workspace_bytes,
                     block_sparse_attention_workspace_bytes(params));
  for_each_sequence(params, [&](AttentionParams dense, const Sequence& sequence) {
    dense.rows = rows_among(params.rows, sequence.first_q_block, dense);
    dense.workspace = static_cast<std::byte*>(params.workspace) + 2 * gathered_bytes(params);
    if (dense.indices != nullptr) check_lists(dense, op);
    Attender(dense).run();
  });
}

void block_sparse_attention(const AttentionParams& params) {
  validate_attention(params, attention_op(params));
  validate_alignment(attention_op(params), params);
  run_attention(params);
}

}  // namespace proxyattn::cpu
