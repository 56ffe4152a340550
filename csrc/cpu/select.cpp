// Stage 4 on the CPU. A row of `indices` is filled with the forced blocks and sorted in place.
#include "proxyattn/select.h"

#include <algorithm>
#include <cmath>

#include "common/block_grid.h"
#include "common/validate.h"
#include "cpu/parallel.h"
#include "cpu/stages.h"

namespace proxyattn::cpu {
namespace {

constexpr const char* kOp = "select_blocks";

// Masses this part of the whole below what is needed will do, so that rounding costs no block.
constexpr double kNeedSlack = 1e-6;

class Selector {
 public:
  explicit Selector(const SelectParams& params)
      : p_(params),
        grid_{p_.q_len, p_.kv_len, p_.q_block, p_.kv_block, p_.q_offset, p_.causal},
        num_blocks_(grid_.num_kv_blocks()),
        heads_per_list_(p_.q_heads / p_.proxy_heads),
        min_blocks_(ceil_div(min_of(p_.min_budget, p_.kv_len), p_.kv_block)) {}

  void run() const {
    const int64_t num_lists = p_.batch * p_.proxy_heads;
    const int64_t num_tasks = num_lists * (p_.rows.end - p_.rows.begin);
    const double work = static_cast<double>(num_tasks) * static_cast<double>(num_blocks_) *
                        static_cast<double>(kSortWork);
    // Later rows see more keys and go first.
    parallel_for(num_tasks, num_workers(work), [&](int64_t task, int) {
      const int64_t list = task % num_lists;
      const int64_t m = p_.rows.end - 1 - task / num_lists;
      const ForcedBlocks forced(grid_, m, p_.num_sink_blocks, p_.num_local_blocks);
      rank(list, m, forced);
      count(list, m, forced);
    });
  }

 private:
  // Cost of ranking one block, in multiply-adds of the parallel regions' measure.
  static constexpr int64_t kSortWork = 500;

  // Where row m of list or head `i` begins among those that a tensor holds `held` of.
  static int64_t row_idx(int64_t i, int64_t m, const BlockRange& held) {
    return i * (held.end - held.begin) + m - held.begin;
  }
  const float* scores_of(const float* tensor, int64_t list, int64_t m) const {
    return tensor + row_idx(list, m, p_.rows) * num_blocks_;
  }
  int32_t* ranking_of(int64_t list, int64_t m) const {
    return p_.indices + row_idx(list, m, p_.list_rows) * p_.list_capacity;
  }

  void rank(int64_t list, int64_t m, const ForcedBlocks& forced) const {
    const float* peak = scores_of(p_.peak, list, m);
    int32_t* ranking = ranking_of(list, m);
    int32_t* end = ranking;
    for (int64_t i = 0; i < forced.count(); ++i) *end++ = static_cast<int32_t>(forced.block_at(i));
    int32_t* const first_free = end;
    for (int64_t n = forced.num_sinks; n < forced.local_begin; ++n) {
      *end++ = static_cast<int32_t>(n);
    }
    std::sort(first_free, end, [peak](int32_t a, int32_t b) {
      const float peak_a = std::isnan(peak[a]) ? INFINITY : peak[a];
      const float peak_b = std::isnan(peak[b]) ? INFINITY : peak[b];
      return peak_a != peak_b ? peak_a > peak_b : a > b;
    });
    std::fill(end, ranking + p_.list_capacity, -1);
  }

  void count(int64_t list, int64_t m, const ForcedBlocks& forced) const {
    const int64_t least = max_of(min_blocks_, max_of<int64_t>(1, forced.count()));
    // Heads are numbered over the batch, as lists are.
    const int64_t first_head = list * heads_per_list_;
    const bool top_p = p_.budget_mode == BudgetMode::kTopP;
    const double free_mass = top_p ? mass_outside(list, m, forced) : 0.0;
    for (int64_t h = first_head; h < first_head + heads_per_list_; ++h) {
      const int64_t wanted =
          top_p ? blocks_to_hold(list, m, forced, static_cast<double>(p_.shares[h]), free_mass)
                : p_.budgets[h];
      p_.counts[row_idx(h, m, p_.list_rows)] =
          static_cast<int32_t>(min_of(max_of(wanted, least), forced.visible));
    }
  }

  // The row's mass outside the forced blocks; a NaN anywhere in what is visible makes it NaN.
  double mass_outside(int64_t list, int64_t m, const ForcedBlocks& forced) const {
    const float* mass = scores_of(p_.mass, list, m);
    const int32_t* ranking = ranking_of(list, m);
    double sum = 0.0;
    for (int64_t i = 0; i < forced.visible; ++i) {
      const double value = static_cast<double>(mass[ranking[i]]);
      if (i >= forced.count() || std::isnan(value)) sum += value;
    }
    return sum;
  }

  // The forced blocks and the shortest run of the ranking after them that holds what a head whose
  // forced blocks hold `share` needs of the rest; all blocks if something is NaN.
  int64_t blocks_to_hold(
      int64_t list, int64_t m, const ForcedBlocks& forced, double share, double free_mass) const {
    if (p_.gamma >= 1.0 || std::isnan(share) || std::isnan(free_mass)) return forced.visible;
    if (share >= 1.0 || free_mass <= 0.0) return forced.count();
    const double need = (p_.gamma - share) / (1.0 - share);  // negative: none, as 0 is
    const double wanted = (need - kNeedSlack) * free_mass;
    const float* mass = scores_of(p_.mass, list, m);
    const int32_t* ranking = ranking_of(list, m);
    double held = 0.0;
    for (int64_t i = forced.count(); i < forced.visible; ++i) {
      if (held >= wanted) return i;
      held += static_cast<double>(mass[ranking[i]]);
    }
    return forced.visible;
  }

  const SelectParams& p_;
  const BlockGrid grid_;
  const int64_t num_blocks_;
  const int64_t heads_per_list_;
  const int64_t min_blocks_;
};

}  // namespace

void run_select(const SelectParams& params) {
  Selector(params).run();
}

void select_blocks(const SelectParams& params) {
  validate_select(params);
  validate_not_packed(kOp, params.packed);
  validate_alignment(kOp, params);
  run_select(params);
}

}  // namespace proxyattn::cpu
