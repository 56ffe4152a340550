// Stage 4 on the CPU. A row of `indices` is filled with the forced blocks and sorted in place.
#include "proxyattn/select.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/block_grid.h"
#include "common/validate.h"
#include "cpu/parallel.h"

namespace proxyattn::cpu {
namespace {

// Shares this far below the target count as reached, so that rounding costs no block.
constexpr double kShareSlack = 1e-6;
// The target of heads that take every block: no share reaches it.
constexpr double kTakeAll = std::numeric_limits<double>::infinity();

class Selector {
 public:
  explicit Selector(const SelectParams& params)
      : p_(params),
        grid_{p_.q_len, p_.kv_len, p_.q_block, p_.kv_block, p_.q_offset, p_.causal},
        num_blocks_(grid_.num_kv_blocks()),
        num_rows_(p_.rows.end - p_.rows.begin),
        heads_per_list_(p_.q_heads / p_.proxy_heads),
        min_blocks_(ceil_div(min_of(p_.min_budget, p_.kv_len), p_.kv_block)) {}

  void run() const {
    if (num_rows_ == 0) return;
    const int64_t num_lists = p_.batch * p_.proxy_heads;
    const double row_work = static_cast<double>(num_blocks_ * kSortWork);
    int64_t end = p_.rows.end;
    if (p_.budget_mode == BudgetMode::kTopP && end == grid_.num_q_blocks()) {
      // The last query block sets the targets of all others and so goes first.
      --end;
      parallel_for(num_lists, num_workers(row_work * static_cast<double>(num_lists)),
                   [&](int64_t list, int) {
                     rank(list, end);
                     set_shares(list, end);
                     count(list, end);
                   });
    }
    const int64_t rows = end - p_.rows.begin;
    parallel_for(num_lists * rows, num_workers(row_work * static_cast<double>(num_lists * rows)),
                 [&](int64_t task, int) {
                   const int64_t m = end - 1 - task / num_lists;
                   rank(task % num_lists, m);
                   count(task % num_lists, m);
                 });
  }

 private:
  // Cost of ranking one block, in multiply-adds of the parallel regions' measure.
  static constexpr int64_t kSortWork = 500;

  // Row m of a [batch * proxy_heads, rows, blocks] tensor.
  template <typename T>
  T* row_of(T* tensor, int64_t list, int64_t m) const {
    return tensor + (list * num_rows_ + m - p_.rows.begin) * num_blocks_;
  }

  void rank(int64_t list, int64_t m) const {
    const float* peak = row_of(p_.peak, list, m);
    int32_t* ranking = row_of(p_.indices, list, m);
    const ForcedBlocks forced(grid_, m, p_.num_sink_blocks, p_.num_local_blocks);
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
    std::fill(end, ranking + num_blocks_, -1);
  }

  double ranked_mass(int64_t list, int64_t m, int64_t num_ranked) const {
    const float* mass = row_of(p_.mass, list, m);
    const int32_t* ranking = row_of(p_.indices, list, m);
    double sum = 0.0;
    for (int64_t i = 0; i < num_ranked; ++i) sum += static_cast<double>(mass[ranking[i]]);
    return sum;
  }

  // First of the heads that read the list: heads are numbered over the batch, as lists are.
  int64_t first_head(int64_t list) const { return list * heads_per_list_; }

  void set_shares(int64_t list, int64_t last) const {
    const int64_t visible = grid_.visible(last);
    const double total = ranked_mass(list, last, visible);
    for (int64_t h = first_head(list); h < first_head(list + 1); ++h) {
      const int64_t budget = max_of(p_.budgets[h], 0);
      p_.shares[h] = budget >= visible ? kTakeAll : ranked_mass(list, last, budget) / total;
    }
  }

  // Length of the shortest prefix of row m's ranking that holds the share; all if none does, as
  // when a NaN is among the masses.
  int64_t blocks_to_cover(int64_t list, int64_t m, double share) const {
    const int64_t visible = grid_.visible(m);
    if (share == kTakeAll) return visible;
    const float* mass = row_of(p_.mass, list, m);
    const int32_t* ranking = row_of(p_.indices, list, m);
    const double total = ranked_mass(list, m, visible);
    double sum = 0.0;
    for (int64_t i = 0; i < visible; ++i) {
      if (sum / total >= share - kShareSlack) return i;
      sum += static_cast<double>(mass[ranking[i]]);
    }
    return visible;
  }

  void count(int64_t list, int64_t m) const {
    const ForcedBlocks forced(grid_, m, p_.num_sink_blocks, p_.num_local_blocks);
    const int64_t least = max_of<int64_t>(1, forced.count());
    for (int64_t h = first_head(list); h < first_head(list + 1); ++h) {
      int64_t blocks = p_.budget_mode == BudgetMode::kTopP
                           ? blocks_to_cover(list, m, p_.shares[h])
                           : p_.budgets[h];
      blocks = max_of(max_of(blocks, min_blocks_), least);
      p_.counts[h * num_rows_ + m - p_.rows.begin] =
          static_cast<int32_t>(min_of(blocks, forced.visible));
    }
  }

  const SelectParams& p_;
  const BlockGrid grid_;
  const int64_t num_blocks_;
  const int64_t num_rows_;
  const int64_t heads_per_list_;
  const int64_t min_blocks_;
};

}  // namespace

void select_blocks(const SelectParams& params) {
  validate_select(params);
  Selector(params).run();
}

}  // namespace proxyattn::cpu
