// Stage 3 on the CPU: tasks scan pieces of the keys for the last queries of one head; when all
// pieces of a head are known, its block masses are sorted and counted, or the forced ones added up.
#include "proxyattn/needs.h"

#include <algorithm>
#include <functional>
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

// Keys of one task: many enough that loading the queries anew costs little.
constexpr int64_t kTaskKeys = 2048;
// Statistics of so many heads are held at a time as fit in this many bytes, at least one head's.
constexpr int64_t kStatsBytes = int64_t{64} << 20;

// What one head's keys amount to.
struct HeadScratch {
  BlockStats stats;
  double* mass;  // [blocks]

  HeadScratch(ScratchLayout& layout, int64_t num_blocks)
      : stats(layout, num_blocks), mass(layout.take<double>(num_blocks)) {}
};

int64_t head_scratch_bytes(const NeedParams& p) {
  ScratchLayout layout;
  HeadScratch(layout, ceil_div(p.kv_len, p.kv_block));
  return layout.bytes();
}

int64_t scan_scratch_bytes(const NeedParams& p) {
  ScratchLayout layout;
  ScanScratch(layout, p.head_dim);
  return layout.bytes();
}

int64_t heads_at_a_time(const NeedParams& p) {
  const int64_t fitting = kStatsBytes / max_of<int64_t>(1, head_scratch_bytes(p));
  return max_of<int64_t>(1, min_of(fitting, p.batch * p.q_heads));
}

bool sees_nothing(const NeedParams& p) {
  return p.q_len == 0 || p.kv_len == 0;
}

// True when the settings and the lengths alone settle what every head needs.
bool is_trivial(const NeedParams& p) {
  const bool depends_on_scores = p.mode == BudgetMode::kTopP || (p.gamma > 0.0 && p.gamma < 1.0);
  return sees_nothing(p) || !depends_on_scores;
}

int32_t trivial_budget(const NeedParams& p) {
  if (sees_nothing(p)) return 0;
  return p.gamma <= 0.0 ? 1 : static_cast<int32_t>(ceil_div(p.kv_len, p.kv_block));
}

void write_trivial(const NeedParams& p) {
  const int64_t num_heads = p.batch * p.q_heads;
  if (p.mode == BudgetMode::kLastBlock) {
    std::fill_n(p.budgets, num_heads, trivial_budget(p));
  } else {
    std::fill_n(p.shares, num_heads, std::numeric_limits<float>::quiet_NaN());
  }
}

class Estimator {
 public:
  explicit Estimator(const NeedParams& params)
      : p_(params),
        kernels_(kernels()),
        grid_{p_.q_len, p_.kv_len, p_.q_block, p_.kv_block, p_.q_offset, p_.causal},
        num_blocks_(grid_.num_kv_blocks()),
        heads_at_a_time_(cpu::heads_at_a_time(p_)),
        head_bytes_(head_scratch_bytes(p_)),
        scan_bytes_(scan_scratch_bytes(p_)) {}

  void run() const {
    const int64_t num_heads = p_.batch * p_.q_heads;
    for (int64_t head = 0; head < num_heads; head += heads_at_a_time_) {
      estimate(head, min_of(head + heads_at_a_time_, num_heads));
    }
  }

 private:
  void estimate(int64_t first_head, int64_t end_head) const {
    const int64_t num_heads = end_head - first_head;
    const int64_t blocks_per_task = kTaskKeys / p_.kv_block;
    const int64_t num_pieces = ceil_div(num_blocks_, blocks_per_task);
    const double work = static_cast<double>(num_heads * p_.head_dim * kMaxScanRows) *
                        static_cast<double>(p_.kv_len);
    parallel_for(num_heads * num_pieces, num_workers(work), [&](int64_t task, int worker) {
      const int64_t slot = task / num_pieces;
      const BlockScan scan = scan_of(first_head + slot);
      const int64_t begin = task % num_pieces * blocks_per_task;
      const int64_t end = min_of(begin + blocks_per_task, scan.num_blocks());
      scan_blocks(kernels_, scan, begin, end, scan_scratch(worker), head_scratch(slot).stats);
    });
    const double finish_work = static_cast<double>(num_heads * num_blocks_ * kMaxScanRows);
    parallel_for(num_heads, num_workers(finish_work), [&](int64_t slot, int) {
      const int64_t head = first_head + slot;
      const BlockScan scan = scan_of(head);
      double* mass = head_scratch(slot).mass;
      sum_rows(scan, head_scratch(slot).stats, mass);
      if (p_.mode == BudgetMode::kLastBlock) {
        p_.budgets[head] = static_cast<int32_t>(blocks_to_reach_gamma(mass, scan.num_blocks()));
      } else {
        p_.shares[head] = forced_share(mass, scan.num_blocks());
      }
    });
  }

  BlockScan scan_of(int64_t head) const {
    const int64_t batch = head / p_.q_heads;
    const int64_t q_head = head % p_.q_heads;
    const int64_t kv_head = q_head / (p_.q_heads / p_.kv_heads);
    BlockScan scan{};
    const QuerySpan queries = grid_.last_queries();
    scan.num_rows = queries.last - queries.first + 1;
    const int64_t first_query = p_.q_len - scan.num_rows;
    scan.queries = head_rows(p_.q, p_.q_strides, p_.dtype, batch, q_head, first_query);
    scan.keys = head_rows(p_.k, p_.k_strides, p_.dtype, batch, kv_head, 0);
    scan.num_keys = p_.kv_len;
    scan.keys_per_block = p_.kv_block;
    scan.head_dim = p_.head_dim;
    scan.first_seen = p_.causal ? queries.first + 1 : p_.kv_len;
    scan.scale = p_.scale;
    return scan;
  }

  // mass[n]: mean over the rows of the probability in key block n.
  void sum_rows(const BlockScan& scan, const BlockStats& stats, double* mass) const {
    finish_scan(kernels_, scan, stats);
    for (int64_t n = 0; n < scan.num_blocks(); ++n) {
      const float* sum = stats.sum + n * kMaxScanRows;
      double total = 0.0;
      for (int64_t row = scan.first_row(n); row < scan.num_rows; ++row) {
        total += static_cast<double>(sum[row]);
      }
      mass[n] = total / static_cast<double>(scan.num_rows);
    }
  }

  int64_t blocks_to_reach_gamma(double* mass, int64_t num_blocks) const {
    double total = 0.0;
    for (int64_t n = 0; n < num_blocks; ++n) total += mass[n];
    if (!(total > 0.0)) return num_blocks_;  // a NaN among them: everything is read
    std::sort(mass, mass + num_blocks, std::greater<>());
    total = 0.0;
    for (int64_t n = 0; n < num_blocks; ++n) total += mass[n];
    double reached = 0.0;
    for (int64_t n = 0; n < num_blocks; ++n) {
      reached += mass[n];
      if (reached >= p_.gamma * total) return n + 1;
    }
    return num_blocks_;
  }

  // The part of the mass that lies in blocks which are read anyway.
  float forced_share(const double* mass, int64_t num_blocks) const {
    const ForcedBlocks forced(grid_, grid_.last_queries(), p_.num_sink_blocks, p_.num_local_blocks);
    double held = 0.0;
    double rest = 0.0;
    for (int64_t n = 0; n < num_blocks; ++n) (forced.rank_of(n) >= 0 ? held : rest) += mass[n];
    const double total = held + rest;
    if (!(total > 0.0)) return std::numeric_limits<float>::quiet_NaN();
    return static_cast<float>(held / total);
  }

  // The workspace holds the heads' arrays, then one scan scratch per worker.
  HeadScratch head_scratch(int64_t slot) const {
    ScratchLayout layout(static_cast<std::byte*>(p_.workspace) + slot * head_bytes_);
    return {layout, num_blocks_};
  }
  ScanScratch scan_scratch(int worker) const {
    ScratchLayout layout(static_cast<std::byte*>(p_.workspace) + heads_at_a_time_ * head_bytes_ +
                         worker * scan_bytes_);
    return {layout, p_.head_dim};
  }

  const NeedParams& p_;
  const Kernels& kernels_;
  const BlockGrid grid_;
  const int64_t num_blocks_;
  const int64_t heads_at_a_time_;
  const int64_t head_bytes_;
  const int64_t scan_bytes_;
};

}  // namespace

int64_t estimate_needs_workspace_bytes(const NeedParams& params) {
  validate_needs(params);
  if (is_trivial(params)) return 0;
  // No less than for fewer keys, of which more heads are held at a time.
  const int64_t head_bytes = head_scratch_bytes(params);
  const int64_t all_heads = params.batch * params.q_heads * head_bytes;
  return max_of(head_bytes, min_of(kStatsBytes, all_heads)) +
         num_threads() * scan_scratch_bytes(params);
}

void run_needs(const NeedParams& params) {
  validate_workspace(needs_op(params), params.workspace, params.workspace_bytes,
                     estimate_needs_workspace_bytes(params));
  if (is_trivial(params)) {
    write_trivial(params);
  } else {
    Estimator(params).run();
  }
}

void estimate_needs(const NeedParams& params) {
  validate_needs(params);
  validate_not_packed(needs_op(params), params.packed);
  validate_alignment(needs_op(params), params);
  run_needs(params);
}

}  // namespace proxyattn::cpu
