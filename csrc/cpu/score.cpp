// Stage 2 on the CPU: a task takes the sampled rows of a few query blocks of one proxy group over
// all the sampled keys that they see.
#include "proxyattn/score.h"

#include <algorithm>
#include <limits>

#include "proxyattn/device.h"

#include "common/block_grid.h"
#include "common/validate.h"
#include "cpu/block_scan.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/stages.h"

namespace proxyattn::cpu {
namespace {

constexpr const char* kOp = "score_blocks";

struct Scratch {
  ScanScratch scan;
  BlockStats stats;

  Scratch(ScratchLayout& layout, const ScoreParams& p)
      : scan(layout, p.head_dim), stats(layout, ceil_div(p.kv_len, p.kv_block)) {}
};

int64_t scratch_bytes(const ScoreParams& p) {
  ScratchLayout layout;
  Scratch(layout, p);
  return layout.bytes();
}

class Scorer {
 public:
  explicit Scorer(const ScoreParams& params)
      : p_(params),
        kernels_(kernels()),
        rows_per_block_(p_.q_block / p_.stride),
        blocks_per_task_(max_of<int64_t>(1, kMaxScanRows / rows_per_block_)),
        num_blocks_(ceil_div(p_.kv_len, p_.kv_block)),
        scratch_bytes_(scratch_bytes(p_)) {}

  void run() const {
    const int64_t num_heads = p_.batch * p_.proxy_heads;
    const int64_t tasks_per_head = ceil_div(p_.rows.end - p_.rows.begin, blocks_per_task_);
    const double rows = static_cast<double>((p_.rows.end - p_.rows.begin) * rows_per_block_);
    const double work = static_cast<double>(num_heads * p_.head_dim) * rows *
                        static_cast<double>(ceil_div(p_.kv_len, p_.stride));
    // Later rows see more keys and go first.
    parallel_for(num_heads * tasks_per_head, num_workers(work), [&](int64_t task, int worker) {
      const int64_t end = p_.rows.end - task / num_heads * blocks_per_task_;
      score(task % num_heads, {max_of(p_.rows.begin, end - blocks_per_task_), end}, worker);
    });
  }

 private:
  void score(int64_t head, const BlockRange& blocks, int worker) const {
    ScratchLayout layout(static_cast<std::byte*>(p_.workspace) + worker * scratch_bytes_);
    const Scratch scratch(layout, p_);
    const int64_t first_row = blocks.begin * rows_per_block_;
    const int64_t end_row = min_of(blocks.end * rows_per_block_, ceil_div(p_.q_len, p_.stride));
    const int64_t batch = head / p_.proxy_heads;
    const int64_t group = head % p_.proxy_heads;

    BlockScan scan{};
    scan.queries = head_rows(p_.q_proxy, p_.q_proxy_strides, p_.dtype, batch, group, first_row);
    const int64_t key_head = group * p_.key_proxy_heads / p_.proxy_heads;
    scan.keys = head_rows(p_.k_proxy, p_.k_proxy_strides, p_.dtype, batch, key_head, 0);
    scan.num_rows = end_row - first_row;
    scan.num_keys = ceil_div(p_.kv_len, p_.stride);
    scan.keys_per_block = p_.kv_block / p_.stride;
    scan.head_dim = p_.head_dim;
    // Sampled row t stands at q_offset + stride * t and sampled key j at stride * j.
    scan.first_seen = p_.causal ? floor_div(p_.q_offset, p_.stride) + first_row + 1 : scan.num_keys;
    scan.scale = p_.scale;

    scan_blocks(kernels_, scan, 0, scan.num_blocks(), scratch.scan, scratch.stats);
    finish_scan(kernels_, scan, scratch.stats);
    for (int64_t m = blocks.begin; m < blocks.end; ++m) {
      const BlockRange rows{(m - blocks.begin) * rows_per_block_,
                            min_of((m - blocks.begin + 1) * rows_per_block_, scan.num_rows)};
      const int64_t row = head * (p_.rows.end - p_.rows.begin) + m - p_.rows.begin;
      write_peak(scan, scratch.stats, rows, p_.peak + row * num_blocks_);
      if (p_.mass != nullptr) {
        write_mass(scan, scratch.stats, rows, p_.mass + row * num_blocks_);
      }
    }
  }

  // Rows [begin, end) of the scan make up the query block.
  void write_peak(const BlockScan& scan,
                  const BlockStats& stats,
                  const BlockRange& rows,
                  float* peak) const {
    std::fill_n(peak, num_blocks_, -std::numeric_limits<float>::infinity());
    for (int64_t n = 0; n < scan.num_blocks(); ++n) {
      const float* top = stats.top + n * kMaxScanRows;
      for (int64_t row = max_of(rows.begin, scan.first_row(n)); row < rows.end; ++row) {
        // A NaN among the rows stays.
        if (!(top[row] <= peak[n])) peak[n] = top[row];
        if (top[row] != top[row]) break;
      }
    }
  }

  void write_mass(const BlockScan& scan,
                  const BlockStats& stats,
                  const BlockRange& rows,
                  float* mass) const {
    std::fill_n(mass, num_blocks_, 0.0f);
    for (int64_t n = 0; n < scan.num_blocks(); ++n) {
      const float* sum = stats.sum + n * kMaxScanRows;
      double total = 0.0;
      for (int64_t row = max_of(rows.begin, scan.first_row(n)); row < rows.end; ++row) {
        total += static_cast<double>(sum[row]);
      }
      mass[n] = static_cast<float>(total / static_cast<double>(rows.end - rows.begin));
    }
  }

  const ScoreParams& p_;
  const Kernels& kernels_;
  const int64_t rows_per_block_;
  const int64_t blocks_per_task_;
  const int64_t num_blocks_;
  const int64_t scratch_bytes_;
};

}  // namespace

int64_t score_blocks_workspace_bytes(const ScoreParams& params) {
  validate_score(params);
  return scratch_bytes(params) * num_threads();
}

void run_score(const ScoreParams& params) {
  validate_workspace(kOp, params.workspace, params.workspace_bytes,
                     score_blocks_workspace_bytes(params));
  if (params.kv_len > 0) Scorer(params).run();
}

void score_blocks(const ScoreParams& params) {
  validate_score(params);
  validate_not_packed(kOp, params.packed);
  validate_alignment(kOp, params);
  run_score(params);
}

}  // namespace proxyattn::cpu
