// select_blocks on the CPU. Grids of blocks of 64, so that lengths are small multiples of 64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "proxyattn/error.h"
#include "proxyattn/select.h"

#include "check.h"
#include "common/block_grid.h"
#include "families.h"

namespace proxyattn {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kBlock = 64;

struct Selection {
  std::vector<int32_t> indices;
  std::vector<int32_t> counts;
};

struct Case {
  int64_t batch = 1;
  int64_t q_len = 0;
  int64_t kv_len = 0;
  int64_t q_heads = 1;
  int64_t proxy_heads = 1;
  int64_t min_budget = 0;
  int64_t num_sink_blocks = 0;
  int64_t num_local_blocks = 0;
  BudgetMode mode = BudgetMode::kLastBlock;
  bool causal = true;
  bool only_prefixes = false;
  std::vector<float> peak;
  std::vector<float> mass;
  std::vector<int32_t> budgets;

  BlockGrid grid() const { return {q_len, kv_len, kBlock, kBlock, kv_len - q_len, causal}; }
};

// `shares` carries what the call with the last query block found out to the calls before it.
Selection select(const Case& c, const BlockRange& rows, std::vector<double>* shares) {
  const int64_t num_rows = c.grid().num_q_blocks();
  const int64_t num_blocks = c.grid().num_kv_blocks();
  const auto part_of = [&](const std::vector<float>& whole) {
    std::vector<float> part;
    for (int64_t list = 0; !whole.empty() && list < c.batch * c.proxy_heads; ++list) {
      const auto first = whole.begin() + (list * num_rows + rows.begin) * num_blocks;
      part.insert(part.end(), first, first + (rows.end - rows.begin) * num_blocks);
    }
    return part;
  };
  const std::vector<float> peak = part_of(c.peak), mass = part_of(c.mass);
  Selection out{std::vector<int32_t>(static_cast<std::size_t>(c.batch * c.proxy_heads *
                                                              (rows.end - rows.begin) * num_blocks),
                                     -9),
                std::vector<int32_t>(
                    static_cast<std::size_t>(c.batch * c.q_heads * (rows.end - rows.begin)), -9)};
  SelectParams p{};
  p.batch = c.batch;
  p.q_len = c.q_len;
  p.kv_len = c.kv_len;
  p.q_heads = c.q_heads;
  p.proxy_heads = c.proxy_heads;
  p.q_block = kBlock;
  p.kv_block = kBlock;
  p.q_offset = c.kv_len - c.q_len;
  p.min_budget = c.min_budget;
  p.num_sink_blocks = c.num_sink_blocks;
  p.num_local_blocks = c.num_local_blocks;
  p.rows = rows;
  p.peak = peak.data();
  p.mass = mass.empty() ? nullptr : mass.data();
  p.budgets = c.budgets.data();
  p.indices = out.indices.data();
  p.counts = out.counts.data();
  p.shares = shares->data();
  p.budget_mode = c.mode;
  p.causal = c.causal;
  p.only_prefixes = c.only_prefixes;
  cpu::select_blocks(p);
  return out;
}

Selection select(const Case& c) {
  std::vector<double> shares(static_cast<std::size_t>(c.batch * c.q_heads));
  return select(c, {0, c.grid().num_q_blocks()}, &shares);
}

std::vector<int32_t> row_of(const std::vector<int32_t>& values, std::size_t row, std::size_t size) {
  const auto first = values.begin() + static_cast<std::ptrdiff_t>(row * size);
  return {first, first + static_cast<std::ptrdiff_t>(size)};
}

// One query block that stands after all keys: a single row of scores, every block visible.
Case one_row(std::vector<float> peak, std::vector<int32_t> budgets) {
  Case c;
  c.q_len = kBlock;
  c.kv_len = static_cast<int64_t>(peak.size()) * kBlock;
  c.q_heads = static_cast<int64_t>(budgets.size());
  c.peak = std::move(peak);
  c.budgets = std::move(budgets);
  return c;
}

using Ints = std::vector<int32_t>;

TEST(ranking_by_hand) {
  Case c = one_row({-3, -1, -5, -1, kNan, -kInf, 0, -2}, {3});
  CHECK(select(c).indices == Ints({4, 6, 3, 1, 7, 0, 2, 5}));
  CHECK(select(c).counts == Ints({3}));
  c.num_sink_blocks = 2;
  CHECK(select(c).indices == Ints({0, 1, 4, 6, 3, 7, 2, 5}));
  c.num_local_blocks = 3;  // local blocks first, latest down, then the sinks
  CHECK(select(c).indices == Ints({7, 6, 5, 0, 1, 4, 3, 2}));
  CHECK(select(c).counts == Ints({5}));  // at least the forced ones
  c.num_local_blocks = 100;
  CHECK(select(c).indices == Ints({7, 6, 5, 4, 3, 2, 1, 0}));
  CHECK(select(c).counts == Ints({8}));
  c.causal = false;  // then no block is local
  CHECK(select(c).indices == Ints({0, 1, 4, 6, 3, 7, 2, 5}));
}

TEST(ties_go_to_the_later_block) {
  CHECK(select(one_row({1, 1, 1, 1}, {1})).indices == Ints({3, 2, 1, 0}));
  CHECK(select(one_row({0.0f, -0.0f, 0.0f}, {1})).indices == Ints({2, 1, 0}));
  CHECK(select(one_row({kNan, kInf, kNan, kInf}, {1})).indices == Ints({3, 2, 1, 0}));
  CHECK(select(one_row({-kInf, -kInf, -1e38f}, {1})).indices == Ints({2, 1, 0}));
}

TEST(counts_of_last_block_mode_by_hand) {
  Case c = one_row({-1, -2, -3, -4, -5}, {2, 1, 99, 0, -4});
  CHECK(select(c).counts == Ints({2, 1, 5, 1, 1}));
  c.min_budget = 129;  // three blocks of 64
  CHECK(select(c).counts == Ints({3, 3, 5, 3, 3}));
  c.min_budget = std::numeric_limits<int64_t>::max();
  CHECK(select(c).counts == Ints({5, 5, 5, 5, 5}));
}

TEST(causal_rows_see_what_lies_before_them) {
  Case c;
  c.q_len = 3 * kBlock;
  c.kv_len = 4 * kBlock;
  c.peak = {-2, -1, -kInf, -kInf, -1, -2, -3, -kInf, -4, -3, -2, -1};
  c.budgets = {2};
  c.num_local_blocks = 1;
  const Selection s = select(c);
  CHECK(row_of(s.indices, 0, 4) == Ints({1, 0, -1, -1}));
  CHECK(row_of(s.indices, 1, 4) == Ints({2, 0, 1, -1}));
  CHECK(row_of(s.indices, 2, 4) == Ints({3, 2, 1, 0}));
  CHECK(s.counts == Ints({2, 2, 2}));
}

TEST(coverage_by_hand) {
  Case c;
  c.mode = BudgetMode::kTopP;
  c.q_len = 2 * kBlock;
  c.kv_len = 5 * kBlock;
  c.q_heads = 5;
  c.peak = {-1, -2, -3, -4, -kInf, -1, -2, -3, -4, -5};
  c.mass = {0.70f, 0.15f, 0.10f, 0.05f, 0, 0.5f, 0.25f, 0.125f, 0.0625f, 0.0625f};
  // Shares of the last row: .5, .75, .875, .9375, all.
  c.budgets = {1, 2, 3, 4, 5};
  const Selection s = select(c);
  CHECK(s.counts == Ints({1, 1, 2, 2, 3, 3, 3, 4, 4, 5}));
  c.min_budget = 100;
  CHECK(select(c).counts == Ints({2, 2, 2, 2, 3, 3, 3, 4, 4, 5}));
}

TEST(coverage_with_broken_masses_reads_everything) {
  Case c;
  c.mode = BudgetMode::kTopP;
  c.q_len = 2 * kBlock;
  c.kv_len = 3 * kBlock;
  c.peak = {-1, -2, -kInf, -1, -2, -3};
  c.mass = {kNan, 0.5f, 0, 0.8f, 0.1f, 0.1f};
  c.budgets = {1};
  CHECK(select(c).counts == Ints({2, 1}));  // only the row with the NaN
  c.mass = {0, 0, 0, 0.8f, 0.1f, 0.1f};
  CHECK(select(c).counts == Ints({2, 1}));
  c.mass = {0.9f, 0.1f, 0, 0.8f, kNan, 0.1f};
  CHECK(select(c).counts == Ints({2, 3}));  // no share to aim at
}

TEST(a_share_within_rounding_is_reached) {
  Case c;
  c.mode = BudgetMode::kTopP;
  c.q_len = 2 * kBlock;
  c.kv_len = 4 * kBlock;
  c.peak = {-1, -2, -3, -kInf, -1, -2, -3, -4};
  c.mass = {0.4999995f, 0.25f, 0.2500005f, 0, 0.5f, 0.2f, 0.2f, 0.1f};
  c.budgets = {1};
  CHECK(select(c).counts == Ints({1, 1}));
  c.mass[0] = 0.499998f;
  CHECK(select(c).counts == Ints({2, 1}));
}

// Random scores with ties, in both modes, checked against the rules of the ranking one by one.
Case random_case(unsigned seed, BudgetMode mode) {
  std::mt19937 random(seed);
  const auto pick = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<unsigned>(high - low + 1));
  };
  Case c;
  c.mode = mode;
  c.causal = pick(0, 3) > 0;
  c.batch = pick(1, 2);
  c.q_len = pick(1, 12 * kBlock);
  c.kv_len = c.q_len + pick(0, 5 * kBlock);
  c.proxy_heads = pick(1, 2);
  c.q_heads = c.proxy_heads * pick(1, 3);
  c.min_budget = pick(0, 3 * kBlock);
  c.num_sink_blocks = pick(0, 2);
  c.num_local_blocks = pick(0, 3);
  const auto cells = static_cast<std::size_t>(c.batch * c.proxy_heads * c.grid().num_q_blocks() *
                                              c.grid().num_kv_blocks());
  for (std::size_t i = 0; i < cells; ++i) {
    c.peak.push_back(-static_cast<float>(pick(0, 9)));
    c.mass.push_back(static_cast<float>(pick(0, 1000)) * 1e-3f);
  }
  for (int64_t h = 0; h < c.batch * c.q_heads; ++h) {
    c.budgets.push_back(static_cast<int32_t>(pick(0, c.grid().num_kv_blocks())));
  }
  return c;
}

void check_ranking(const Case& c, int64_t list, int64_t m, const Ints& ranking) {
  const ForcedBlocks forced(c.grid(), m, c.num_sink_blocks, c.num_local_blocks);
  const float* peak =
      c.peak.data() + (list * c.grid().num_q_blocks() + m) * c.grid().num_kv_blocks();
  Ints sorted(ranking.begin(), ranking.begin() + forced.visible);
  std::sort(sorted.begin(), sorted.end());
  for (int64_t n = 0; n < forced.visible; ++n) {
    CHECK_EQ(sorted[static_cast<std::size_t>(n)], n);  // each visible block once
  }
  for (int64_t i = 0; i < static_cast<int64_t>(ranking.size()); ++i) {
    const int32_t n = ranking[static_cast<std::size_t>(i)];
    if (i >= forced.visible) CHECK_EQ(n, -1);
    if (i < forced.count()) CHECK_EQ(n, forced.block_at(i));
    if (i > forced.count() && i < forced.visible) {
      const int32_t before = ranking[static_cast<std::size_t>(i) - 1];
      CHECK(peak[before] > peak[n] || (peak[before] == peak[n] && before > n));
    }
  }
}

double mass_of(const Case& c, int64_t list, int64_t m, const Ints& ranking, int64_t num_ranked) {
  const float* mass =
      c.mass.data() + (list * c.grid().num_q_blocks() + m) * c.grid().num_kv_blocks();
  double sum = 0.0;
  for (int64_t i = 0; i < num_ranked; ++i) {
    sum += static_cast<double>(mass[ranking[static_cast<std::size_t>(i)]]);
  }
  return sum;
}

void check_selection(const Case& c, const Selection& s) {
  const int64_t num_rows = c.grid().num_q_blocks();
  const auto num_blocks = static_cast<std::size_t>(c.grid().num_kv_blocks());
  const int64_t last = num_rows - 1;
  for (int64_t head = 0; head < c.batch * c.q_heads; ++head) {
    const int64_t list = head / (c.q_heads / c.proxy_heads);
    const auto ranking_of = [&](int64_t m) {
      return row_of(s.indices, static_cast<std::size_t>(list * num_rows + m), num_blocks);
    };
    const int64_t budget = c.budgets[static_cast<std::size_t>(head)];
    const int64_t last_visible = c.grid().visible(last);
    const double share = mass_of(c, list, last, ranking_of(last), min_of(budget, last_visible)) /
                         mass_of(c, list, last, ranking_of(last), last_visible);
    for (int64_t m = 0; m < num_rows; ++m) {
      const Ints ranking = ranking_of(m);
      check_ranking(c, list, m, ranking);
      const ForcedBlocks forced(c.grid(), m, c.num_sink_blocks, c.num_local_blocks);
      const int64_t least =
          max_of(max_of<int64_t>(1, forced.count()), ceil_div(c.min_budget, kBlock));
      const int64_t count = s.counts[static_cast<std::size_t>(head * num_rows + m)];
      CHECK(min_of(least, forced.visible) <= count && count <= forced.visible);
      if (c.mode == BudgetMode::kLastBlock) {
        CHECK_EQ(count, min_of(max_of(budget, least), forced.visible));
      } else if (budget >= last_visible) {
        CHECK_EQ(count, forced.visible);
      } else {
        // The count covers the share and, unless a minimum holds it up, one block less does not.
        const double total = mass_of(c, list, m, ranking, forced.visible);
        CHECK(!(mass_of(c, list, m, ranking, count) / total < share - 1e-6) ||
              count == forced.visible);
        if (count > least) {
          CHECK(!(mass_of(c, list, m, ranking, count - 1) / total >= share - 1e-6));
        }
      }
    }
  }
}

TEST(random_selections_follow_the_rules) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    for (const BudgetMode mode : {BudgetMode::kLastBlock, BudgetMode::kTopP}) {
      const Case c = random_case(seed, mode);
      check_selection(c, select(c));
    }
  }
}

TEST(ranges_of_rows_and_threads_give_the_same_bits) {
  for (unsigned seed = 100; seed < 120; ++seed) {
    const Case c = random_case(seed, BudgetMode::kTopP);
    const Selection whole = select(c);
    test::for_some_thread_counts([&] { CHECK(select(c).indices == whole.indices); });
    // From the end, as the pipeline goes: the first call leaves the shares for the others.
    std::vector<double> shares(static_cast<std::size_t>(c.batch * c.q_heads));
    const int64_t num_rows = c.grid().num_q_blocks();
    const auto num_blocks = static_cast<std::size_t>(c.grid().num_kv_blocks());
    for (int64_t m = num_rows - 1; m >= 0; --m) {
      const Selection part = select(c, {m, m + 1}, &shares);
      for (int64_t list = 0; list < c.batch * c.proxy_heads; ++list) {
        CHECK(row_of(part.indices, static_cast<std::size_t>(list), num_blocks) ==
              row_of(whole.indices, static_cast<std::size_t>(list * num_rows + m), num_blocks));
      }
      for (int64_t head = 0; head < c.batch * c.q_heads; ++head) {
        CHECK_EQ(part.counts[static_cast<std::size_t>(head)],
                 whole.counts[static_cast<std::size_t>(head * num_rows + m)]);
      }
    }
  }
}

TEST(empty_inputs) {
  Case c;
  c.budgets = {3};
  c.kv_len = kBlock;
  CHECK(select(c).counts.empty());  // no queries
  c.kv_len = 0;
  c.q_len = kBlock;
  c.causal = false;
  c.num_sink_blocks = 1;
  CHECK(select(c).counts == Ints({0}));  // no keys
}

TEST(rules) {
  Case c = one_row({-1, -2}, {1, 1, 1});
  c.proxy_heads = 2;
  c.peak = {-1, -2, -1, -2};
  CHECK_THROWS(InvalidArgument,
               "select_blocks: num_proxy_heads must divide q_heads, got num_proxy_heads=2, "
               "q_heads=3",
               select(c));
  c = one_row({-1, -2}, {1});
  c.num_sink_blocks = -1;
  CHECK_THROWS(InvalidArgument,
               "select_blocks: num_sink_blocks must be at least 0, got num_sink_blocks=-1",
               select(c));
  c.num_sink_blocks = 0;
  c.only_prefixes = true;
  c.mode = BudgetMode::kTopP;
  c.mass = {0.5f, 0.5f};
  CHECK_THROWS(InvalidArgument,
               "select_blocks: only_prefixes must be false with budget_mode=\"coverage\", got true",
               select(c));
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
