// The geometry of blocks against its definition, key by key.
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

#include "check.h"
#include "common/block_grid.h"

namespace proxyattn {
namespace {

// Key block n is visible to query block m if any of its keys is visible to any of its queries.
bool sees(const BlockGrid& grid, int64_t m, int64_t n) {
  for (int64_t i = m * grid.q_block; i < min_of((m + 1) * grid.q_block, grid.q_len); ++i) {
    for (int64_t j = n * grid.kv_block; j < min_of((n + 1) * grid.kv_block, grid.kv_len); ++j) {
      const int64_t behind = grid.q_offset + i - j;
      const bool in_window = grid.window == 0 || behind < grid.window;
      if (!grid.causal || (behind >= 0 && in_window)) return true;
    }
  }
  return false;
}

template <typename Check>
void for_many_grids(const Check& check) {
  for (const int64_t q_block : {2, 4}) {
    for (const int64_t kv_block : {2, 4}) {
      for (int64_t kv_len = 1; kv_len <= 13; ++kv_len) {
        for (int64_t q_len = 1; q_len <= kv_len; ++q_len) {
          for (const int64_t window : {0, 1, 2, 3, 5, 20}) {
            check(BlockGrid{q_len, kv_len, q_block, kv_block, kv_len - q_len, true, window});
          }
          check(BlockGrid{q_len, kv_len, q_block, kv_block, kv_len - q_len, false});
        }
      }
    }
  }
}

// Grids whose queries lie before, across and behind their keys.
template <typename Check>
void for_all_offsets(const Check& check) {
  for (const int64_t q_block : {2, 4}) {
    for (const int64_t kv_block : {2, 4}) {
      for (const int64_t kv_len : {0, 1, 4, 9}) {
        for (const int64_t q_len : {0, 1, 3, 8}) {
          for (int64_t q_offset = -20; q_offset <= 20; ++q_offset) {
            for (const int64_t window : {0, 1, 3, 6}) {
              check(BlockGrid{q_len, kv_len, q_block, kv_block, q_offset, true, window});
            }
          }
        }
      }
    }
  }
}

TEST(visible_blocks_are_those_with_a_visible_key) {
  for_many_grids([](const BlockGrid& grid) {
    CHECK_EQ(grid.num_q_blocks(), (grid.q_len + grid.q_block - 1) / grid.q_block);
    CHECK_EQ(grid.num_kv_blocks(), (grid.kv_len + grid.kv_block - 1) / grid.kv_block);
    for (int64_t m = 0; m < grid.num_q_blocks(); ++m) {
      for (int64_t n = 0; n < grid.num_kv_blocks(); ++n) {
        CHECK_EQ(grid.first_visible(m) <= n && n < grid.visible(m), sees(grid, m, n));
      }
    }
  });
}

TEST(forced_blocks_follow_the_text) {
  for_many_grids([](const BlockGrid& grid) {
    for (int64_t m = 0; m < grid.num_q_blocks(); ++m) {
      for (const int64_t num_sinks : {0, 1, 2, 100}) {
        for (const int64_t num_local : {0, 1, 2, 100}) {
          const int64_t first = grid.first_visible(m);
          const int64_t visible = grid.visible(m);
          std::vector<int64_t> expected;
          if (grid.causal && num_local > 0) {
            // Down to the block of the query block's first position, then num_local - 1 more.
            const int64_t own = grid.first_position(m) / grid.kv_block;
            for (int64_t n = visible - 1; n >= first && n >= own - (num_local - 1); --n) {
              expected.push_back(n);
            }
          }
          const std::set<int64_t> local(expected.begin(), expected.end());
          for (int64_t n = first; n < min_of(num_sinks, visible); ++n) {
            if (local.count(n) == 0) expected.push_back(n);
          }
          const ForcedBlocks forced(grid, m, num_sinks, num_local);
          CHECK_EQ(forced.count(), static_cast<int64_t>(expected.size()));
          for (std::size_t rank = 0; rank < expected.size(); ++rank) {
            CHECK_EQ(forced.block_at(static_cast<int64_t>(rank)), expected[rank]);
            CHECK_EQ(forced.rank_of(expected[rank]), static_cast<int64_t>(rank));
          }
          const std::set<int64_t> all(expected.begin(), expected.end());
          for (int64_t n = first; n < visible; ++n) {
            if (all.count(n) == 0) CHECK_EQ(forced.rank_of(n), -1);
          }
        }
      }
    }
  });
}

TEST(a_span_of_queries_is_treated_as_a_block) {
  for_many_grids([](const BlockGrid& grid) {
    const QuerySpan last = grid.last_queries();
    CHECK_EQ(last.last, grid.last_position(grid.num_q_blocks() - 1));
    CHECK_EQ(last.last - last.first + 1, min_of(grid.q_block, grid.q_len));
    // A grid whose only query block is that span.
    const BlockGrid only{last.last - last.first + 1,
                         grid.kv_len,
                         grid.q_block,
                         grid.kv_block,
                         last.first,
                         grid.causal,
                         grid.window};
    CHECK_EQ(grid.first_visible(last), only.first_visible(0));
    CHECK_EQ(grid.visible(last), only.visible(0));
    for (const int64_t num_sinks : {0, 1, 100}) {
      for (const int64_t num_local : {0, 1, 2, 100}) {
        const ForcedBlocks got(grid, last, num_sinks, num_local);
        const ForcedBlocks expected(only, 0, num_sinks, num_local);
        CHECK_EQ(got.visible, expected.visible);
        CHECK_EQ(got.local_begin, expected.local_begin);
        CHECK_EQ(got.num_sinks, expected.num_sinks);
      }
    }
  });
}

TEST(a_causal_grid_by_hand) {
  // Queries stand at positions 3 to 9; query blocks {3..6} and {7..9}; key blocks of 4.
  const BlockGrid grid{7, 10, 4, 4, 3, true};
  CHECK_EQ(grid.first_position(1), 7);
  CHECK_EQ(grid.last_position(1), 9);
  CHECK_EQ(grid.visible(0), 2);
  CHECK_EQ(grid.visible(1), 3);
  const ForcedBlocks forced(grid, 1, 1, 1);  // blocks 2 and 1 are local, 0 is the sink
  CHECK_EQ(forced.count(), 3);
  CHECK_EQ(forced.block_at(0), 2);
  CHECK_EQ(forced.block_at(1), 1);
  CHECK_EQ(forced.block_at(2), 0);
  // The last four queries stand at 6 to 9: from the middle of block 1 on.
  const ForcedBlocks last(grid, grid.last_queries(), 1, 1);
  CHECK_EQ(last.local_begin, 1);
  CHECK_EQ(last.num_sinks, 1);
}

TEST(no_keys_are_no_blocks) {
  const BlockGrid grid{5, 0, 4, 4, -5, false};
  CHECK_EQ(grid.visible(0), 0);
  CHECK_EQ(ForcedBlocks(grid, 0, 1, 1).count(), 0);
}

TEST(visible_blocks_of_queries_anywhere) {
  for_all_offsets([](const BlockGrid& grid) {
    for (int64_t m = 0; m < grid.num_q_blocks(); ++m) {
      CHECK(0 <= grid.first_visible(m) && grid.first_visible(m) <= grid.visible(m));
      CHECK(grid.visible(m) <= grid.num_kv_blocks());
      CHECK(grid.num_visible(m) <= grid.most_visible());
      for (int64_t n = 0; n < grid.num_kv_blocks(); ++n) {
        CHECK_EQ(grid.first_visible(m) <= n && n < grid.visible(m), sees(grid, m, n));
      }
    }
  });
}

TEST(queries_before_the_keys_by_hand) {
  // Blocks of 64 and 128 keys. Query block 0 stands at positions -100 to -37, block 1 at -36 to 27.
  const BlockGrid grid{128, 300, 64, 128, -100, true};
  CHECK_EQ(grid.visible(0), 0);
  CHECK_EQ(ForcedBlocks(grid, 0, 1, 1).count(), 0);
  CHECK_EQ(grid.visible(1), 1);
  const ForcedBlocks forced(grid, 1, 1, 1);
  CHECK_EQ(forced.count(), 1);
  CHECK_EQ(forced.block_at(0), 0);
  // The last position is the one before key 0, and then key 0.
  CHECK_EQ((BlockGrid{64, 300, 64, 64, -64, true}.visible(0)), 0);
  CHECK_EQ((BlockGrid{64, 300, 64, 64, -63, true}.visible(0)), 1);
}

void check_bounds(const BlockGrid& grid, const std::vector<int64_t>& numbers) {
  CHECK(grid.num_q_blocks() >= 0);
  CHECK(grid.num_kv_blocks() >= 0);
  for (const int64_t m : numbers) {
    const int64_t first = grid.first_visible(m);
    CHECK(0 <= first && first <= grid.visible(m) && grid.visible(m) <= grid.num_kv_blocks());
    if (m < std::numeric_limits<int64_t>::max()) CHECK(grid.visible(m) <= grid.visible(m + 1));
    if (0 <= m && m < grid.num_q_blocks() - 1) CHECK(first <= grid.first_visible(m + 1));
    for (const int64_t count : numbers) {
      const ForcedBlocks forced(grid, m, count, count);
      CHECK(first <= forced.local_begin && forced.local_begin <= forced.visible);
      CHECK(0 <= forced.num_sinks && first + forced.num_sinks <= forced.local_begin);
    }
  }
}

TEST(nothing_overflows_or_goes_negative) {
  constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const std::vector<int64_t> numbers = {kLeast, kLeast + 1, -(int64_t{1} << 61), -1000,     -1,   0,
                                        1,      1000,       int64_t{1} << 61,    kMost - 1, kMost};
  for (const int64_t q_len : numbers) {
    for (const int64_t kv_len : numbers) {
      for (const int64_t q_offset : numbers) {
        for (const int64_t window : {int64_t{0}, int64_t{1}, int64_t{1000}, kMost}) {
          check_bounds({q_len, kv_len, 64, 128, q_offset, true, window}, numbers);
        }
        check_bounds({q_len, kv_len, 64, 128, q_offset, false}, numbers);
      }
    }
  }
}

TEST(a_window_by_hand) {
  // Queries stand at positions 3 to 9 and see three keys each; key blocks of 4. Block 1's see keys
  // 5 to 9, the last four queries 4 to 9.
  const BlockGrid grid{7, 10, 4, 4, 3, true, 3};
  CHECK_EQ(grid.first_visible(0), 0);
  CHECK_EQ(grid.first_visible(1), 1);
  CHECK_EQ(grid.visible(1), 3);
  CHECK_EQ(grid.most_visible(), 3);
  const ForcedBlocks forced(grid, 1, 2, 0);  // of the sink blocks 0 and 1 the first is not visible
  CHECK_EQ(forced.count(), 1);
  CHECK_EQ(forced.block_at(0), 1);
  CHECK_EQ(forced.num_visible(), 2);
  CHECK_EQ(grid.first_visible(grid.last_queries()), 1);
}

void check_same(const RowKeys<int32_t>& narrow, const RowKeys<int64_t>& wide) {
  for (const int32_t row : {0, 1, 63, 127}) {
    CHECK_EQ(int64_t{narrow.begin(row)}, wide.begin(row));
    CHECK_EQ(int64_t{narrow.end(row)}, wide.end(row));
  }
}

TEST(numbers_of_32_bits_say_the_same) {
  constexpr int64_t kFar = (int64_t{1} << 31) - 1024;
  for (const bool causal : {false, true}) {
    for (const int64_t window : {int64_t{0}, int64_t{1}, int64_t{100}, kFar, int64_t{1} << 62}) {
      for (const int64_t position :
           {-kFar, int64_t{-70}, int64_t{0}, int64_t{150}, kFar / 2, kFar - 200}) {
        for (const int64_t num_keys : {int64_t{0}, int64_t{1}, int64_t{200}, kFar}) {
          const auto wide = Visibility<int64_t>(causal, window).rows(position, num_keys);
          check_same(wide.narrow(), wide);
          if (-kFar / 2 > position || position > kFar / 2) continue;
          check_same(Visibility<int32_t>(causal, window)
                         .rows(static_cast<int32_t>(position), static_cast<int32_t>(num_keys)),
                     wide);
        }
      }
    }
  }
}

TEST(far_away_queries_see_all_or_nothing) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const BlockGrid behind{1000, 1000, 64, 64, kMost, true};
  CHECK_EQ(behind.visible(0), 16);
  CHECK_EQ(ForcedBlocks(behind, 0, 0, 5).count(), 0);  // its own blocks would come far later
  const BlockGrid before{1000, 1000, 64, 64, -kMost, true};
  CHECK_EQ(before.visible(15), 0);
  CHECK_EQ((BlockGrid{-5, -kMost, 64, 64, 0, true}.num_q_blocks()), 0);
  CHECK_EQ((BlockGrid{-5, -kMost, 64, 64, 0, true}.num_kv_blocks()), 0);
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
