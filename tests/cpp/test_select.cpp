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
  std::vector<float> peak;
  std::vector<float> mass;       // with kTopP
  std::vector<int32_t> budgets;  // with kLastBlock
  std::vector<float> shares;     // with kTopP
  double gamma = 0.5;

  BlockGrid grid() const { return {q_len, kv_len, kBlock, kBlock, kv_len - q_len, causal}; }
};

Selection empty_lists(const Case& c) {
  const int64_t num_rows = c.grid().num_q_blocks();
  const int64_t cells = c.batch * c.proxy_heads * num_rows * c.grid().num_kv_blocks();
  return {std::vector<int32_t>(static_cast<std::size_t>(cells), -9),
          std::vector<int32_t>(static_cast<std::size_t>(c.batch * c.q_heads * num_rows), -9)};
}

// Fills `rows` of the lists.
void select(const Case& c, const BlockRange& rows, Selection* out) {
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
  p.list_rows = {0, num_rows};
  p.list_capacity = num_blocks;
  p.peak = peak.data();
  p.mass = mass.empty() ? nullptr : mass.data();
  p.budgets = c.budgets.data();
  p.shares = c.shares.data();
  p.indices = out->indices.data();
  p.counts = out->counts.data();
  p.gamma = c.gamma;
  p.budget_mode = c.mode;
  p.causal = c.causal;
  cpu::select_blocks(p);
}

Selection select(const Case& c) {
  Selection out = empty_lists(c);
  select(c, {0, c.grid().num_q_blocks()}, &out);
  return out;
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

// The same with masses, no block forced unless asked for.
Case top_p_row(std::vector<float> mass, double gamma, std::vector<float> shares) {
  std::vector<float> peak;
  for (std::size_t n = 0; n < mass.size(); ++n) peak.push_back(-static_cast<float>(n));
  Case c = one_row(std::move(peak), Ints(shares.size()));
  c.mode = BudgetMode::kTopP;
  c.mass = std::move(mass);
  c.gamma = gamma;
  c.shares = std::move(shares);
  return c;
}

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

TEST(top_p_by_hand) {
  // Ranking 0 to 4; without forced blocks and shares the need is gamma.
  const std::vector<float> mass = {0.5f, 0.25f, 0.125f, 0.0625f, 0.0625f};
  const auto count = [&](double gamma) { return select(top_p_row(mass, gamma, {0.0f})).counts[0]; };
  CHECK_EQ(count(0.5), 1);
  CHECK_EQ(count(0.51), 2);
  CHECK_EQ(count(0.75), 2);
  CHECK_EQ(count(0.876), 4);
  CHECK_EQ(count(0.99), 5);
  CHECK_EQ(count(0.0), 1);  // at least one block
  CHECK_EQ(count(-3.0), 1);

  // Blocks 4 and 0 are forced: of the .4375 in blocks 1, 2 and 3 the part need is wanted.
  Case c = top_p_row(mass, 0.9, {0.0f, 0.6f, 0.8f, 0.85f, 0.9f, 0.95f});
  c.num_sink_blocks = c.num_local_blocks = 1;
  // Needs .9, .75, .5, .333, 0, negative; prefixes hold .571, .857, 1.
  CHECK(select(c).counts == Ints({5, 4, 3, 3, 2, 2}));
  c.min_budget = 129;  // three blocks of 64
  CHECK(select(c).counts == Ints({5, 4, 3, 3, 3, 3}));
  c.min_budget = std::numeric_limits<int64_t>::max();
  CHECK(select(c).counts == Ints({5, 5, 5, 5, 5, 5}));
}

TEST(every_row_of_top_p_stands_alone) {
  Case c;
  c.mode = BudgetMode::kTopP;
  c.q_len = 2 * kBlock;
  c.kv_len = 5 * kBlock;
  c.q_heads = 4;
  c.peak = {-1, -2, -3, -4, -kInf, -1, -2, -3, -4, -5};
  c.mass = {0.70f, 0.15f, 0.10f, 0.05f, 0, 0.5f, 0.25f, 0.125f, 0.0625f, 0.0625f};
  c.gamma = 0.8;
  c.shares = {0, 0.2f, 0.6f, 1};  // needs .8, .75, .5, none
  CHECK(select(c).counts == Ints({2, 3, 2, 2, 1, 1, 1, 1}));
  // Of the last row only the masses' proportions matter.
  for (std::size_t n = 5; n < 10; ++n) c.mass[n] *= 1024.0f;
  CHECK(select(c).counts == Ints({2, 3, 2, 2, 1, 1, 1, 1}));
}

TEST(what_settles_a_count_without_masses) {
  const std::vector<float> mass = {0.5f, 0.25f, 0.125f, 0.125f};
  const auto counts = [&](double gamma, std::vector<float> shares) {
    Case c = top_p_row(mass, gamma, std::move(shares));
    c.num_sink_blocks = 1;
    return select(c).counts;
  };
  const double inf = static_cast<double>(kInf);
  // All: gamma of 1 or more, whatever the share, and a NaN share.
  CHECK(counts(1.0, {0.0f, 1.0f, kNan}) == Ints({4, 4, 4}));
  CHECK(counts(inf, {0.0f, 1.0f, kNan}) == Ints({4, 4, 4}));
  CHECK(counts(0.0, {kNan}) == Ints({4}));
  // None beyond the forced ones: a share of 1 or more, a share that is enough.
  CHECK(counts(0.9, {1.0f, 2.0f, kInf, 0.95f}) == Ints({1, 1, 1, 1}));
  CHECK(counts(-inf, {0.0f, 0.5f}) == Ints({1, 1}));
  // Negative shares are nobody's, but harmless.
  CHECK(counts(0.5, {-1e30f, -kInf}) == Ints({4, 4}));
}

TEST(top_p_with_broken_masses) {
  const auto counts = [](std::vector<float> mass) {
    Case c = top_p_row(std::move(mass), 0.5, {0.25f, 1.0f});
    c.num_sink_blocks = 1;
    return select(c).counts;
  };
  CHECK(counts({0.5f, 0.25f, 0.25f}) == Ints({2, 1}));
  CHECK(counts({kNan, 0.25f, 0.25f}) == Ints({3, 3}));  // in a forced block too
  CHECK(counts({0.5f, 0.25f, kNan}) == Ints({3, 3}));
  CHECK(counts({1, 0, 0}) == Ints({1, 1}));  // nothing outside the forced block
  CHECK(counts({1, -0.5f, 0}) == Ints({1, 1}));
  // What is not visible does not matter.
  Case c = top_p_row({0.5f, 0.5f, kNan, kNan}, 0.5, {0.0f});
  c.q_len = 3 * kBlock;
  c.peak.assign(12, -1.0f);
  c.mass = {0.5f, 0.5f, kNan, kNan, 0.2f, 0.3f, 0.5f, kNan, 0.1f, 0.2f, 0.3f, 0.4f};
  CHECK(select(c).counts == Ints({1, 1, 2}));  // equal peaks: from the latest block down
}

TEST(a_need_within_rounding_is_met) {
  CHECK(select(top_p_row({0.4999995f, 0.5000005f}, 0.5, {0.0f})).counts == Ints({1}));
  CHECK(select(top_p_row({0.499998f, 0.500002f}, 0.5, {0.0f})).counts == Ints({2}));
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
    c.shares.push_back(static_cast<float>(pick(0, 20)) * 0.05f);
  }
  c.gamma = static_cast<double>(pick(1, 19)) * 0.05;
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

// Of places [begin, end) of a ranking.
double mass_of(
    const Case& c, int64_t list, int64_t m, const Ints& ranking, int64_t begin, int64_t end) {
  const float* mass =
      c.mass.data() + (list * c.grid().num_q_blocks() + m) * c.grid().num_kv_blocks();
  double sum = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    sum += static_cast<double>(mass[ranking[static_cast<std::size_t>(i)]]);
  }
  return sum;
}

void check_selection(const Case& c, const Selection& s) {
  const int64_t num_rows = c.grid().num_q_blocks();
  const auto num_blocks = static_cast<std::size_t>(c.grid().num_kv_blocks());
  for (int64_t head = 0; head < c.batch * c.q_heads; ++head) {
    const int64_t list = head / (c.q_heads / c.proxy_heads);
    const int64_t budget = c.budgets[static_cast<std::size_t>(head)];
    const double share = static_cast<double>(c.shares[static_cast<std::size_t>(head)]);
    for (int64_t m = 0; m < num_rows; ++m) {
      const Ints ranking =
          row_of(s.indices, static_cast<std::size_t>(list * num_rows + m), num_blocks);
      check_ranking(c, list, m, ranking);
      const ForcedBlocks forced(c.grid(), m, c.num_sink_blocks, c.num_local_blocks);
      const int64_t least =
          max_of(max_of<int64_t>(1, forced.count()), ceil_div(c.min_budget, kBlock));
      const int64_t count = s.counts[static_cast<std::size_t>(head * num_rows + m)];
      CHECK(min_of(least, forced.visible) <= count && count <= forced.visible);
      if (c.mode == BudgetMode::kLastBlock) {
        CHECK_EQ(count, min_of(max_of(budget, least), forced.visible));
        continue;
      }
      // With what is read beside the forced blocks a head drops at most 1 - gamma, as far as the
      // proxy knows; and unless a minimum holds the count up, one block less drops more.
      const int64_t first = forced.count();
      const double rest = mass_of(c, list, m, ranking, first, forced.visible);
      const auto kept = [&](int64_t end) {
        const double part = rest > 0.0 ? mass_of(c, list, m, ranking, first, end) / rest : 1.0;
        return share + (1.0 - share) * part;
      };
      CHECK(kept(count) >= c.gamma - 2e-6);
      if (count > min_of(least, forced.visible)) CHECK(kept(count - 1) < c.gamma);
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
    test::for_some_thread_counts([&] {
      CHECK(select(c).indices == whole.indices);
      CHECK(select(c).counts == whole.counts);
    });
    Selection pieces = empty_lists(c);
    const int64_t num_rows = c.grid().num_q_blocks();
    for (int64_t end = num_rows; end > 0; end -= 2) {
      select(c, {max_of<int64_t>(0, end - 2), end}, &pieces);
    }
    CHECK(pieces.indices == whole.indices);
    CHECK(pieces.counts == whole.counts);
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
  c.gamma = static_cast<double>(kNan);
  CHECK_THROWS(InvalidArgument, "select_blocks: gamma must be a number, got gamma=nan", select(c));
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
