// What the rows of a tile see, and what the attention kernels make of it on a GPU: which key blocks
// they walk without a list, and which key tiles they may take without a mask.
#include <cstdint>

#include "check.h"
#include "common/visibility.h"

namespace proxyattn {
namespace {

struct Call {
  int64_t q_len;
  int64_t kv_len;
  int64_t offset;
  bool causal;
  int64_t window;

  bool sees(int64_t query, int64_t key) const {
    const int64_t behind = offset + query - key;
    if (key < 0 || key >= kv_len) return false;
    return !causal || (behind >= 0 && (window == 0 || behind < window));
  }
};

template <typename Check>
void for_many_calls(const Check& check) {
  for (const int64_t kv_len : {1, 64, 200, 449}) {
    for (const int64_t q_len : {1, 64, 130, 200}) {
      for (const int64_t offset : {kv_len - q_len, int64_t{-70}, int64_t{0}, int64_t{300}}) {
        check(Call{q_len, kv_len, offset, false, 0});
        for (const int64_t window : {0, 1, 63, 64, 65, 130, 1000}) {
          check(Call{q_len, kv_len, offset, true, window});
        }
      }
    }
  }
}

// Calls check(first query, rows, what they see) for each tile of so many rows.
template <typename Check>
void for_tiles(const Call& call, int tile_rows, const Check& check) {
  const Visibility<int32_t> rule(call.causal, call.window);
  for (int first = 0; first < call.q_len; first += tile_rows) {
    const int rows = static_cast<int>(min_of<int64_t>(tile_rows, call.q_len - first));
    check(first, rows,
          rule.rows(static_cast<int>(call.offset) + first, static_cast<int>(call.kv_len)));
  }
}

TEST(rows_see_what_the_rule_says) {
  for_many_calls([](const Call& call) {
    for_tiles(call, 128, [&](int first, int rows, const RowKeys<int32_t>& seen) {
      for (int row = 0; row < rows; row += 7) {
        for (int key = 0; key < call.kv_len; ++key) {
          CHECK_EQ(seen.begin(row) <= key && key < seen.end(row), call.sees(first + row, key));
        }
      }
    });
  });
}

TEST(blocks_without_a_list_are_those_that_are_seen) {
  for_many_calls([](const Call& call) {
    for_tiles(call, 64, [&](int first, int rows, const RowKeys<int32_t>& seen) {
      const KeyBlocks<int32_t> blocks = seen.blocks(rows - 1, 64);
      for (int block = 0; block * 64 < call.kv_len; ++block) {
        bool any = false;
        for (int row = 0; row < rows; ++row) {
          for (int key = block * 64; key < (block + 1) * 64 && !any; ++key) {
            any = call.sees(first + row, key);
          }
        }
        CHECK_EQ(blocks.first <= block && block < blocks.end, any);
      }
    });
  });
}

// Of `tile_keys` keys from `key` on every row sees all.
bool is_whole(const Call& call, int first, int rows, int key, int tile_keys) {
  for (int row = 0; row < rows; ++row) {
    if (!call.sees(first + row, key) || !call.sees(first + row, key + tile_keys - 1)) return false;
  }
  return true;
}

// As sm80/kernel.cuh asks: before a tile's first row ends, and from where its last row begins.
TEST(tiles_of_the_portable_kernel_without_a_mask_are_whole) {
  for_many_calls([](const Call& call) {
    for_tiles(call, 64, [&](int first, int rows, const RowKeys<int32_t>& seen) {
      for (int key = 0; key < call.kv_len; key += 64) {
        const bool masked = key + 64 > seen.end(0) || key < seen.begin(rows - 1);
        CHECK_EQ(!masked, is_whole(call, first, rows, key, 64));
      }
    });
  });
}

// As sm90 does: the scout marks parts that a window cuts for any row of the query block, and each
// warpgroup knows how many are whole at the other side for its own 64.
TEST(parts_of_the_hopper_kernel_without_a_mask_are_whole) {
  constexpr int kGroupRows = 64;
  for_many_calls([](const Call& call) {
    for_tiles(call, 2 * kGroupRows, [&](int first, int rows, const RowKeys<int32_t>& seen) {
      for (const int part_rows : {64, 128}) {
        const int cut_parts = ceil_div(seen.begin(rows - 1), part_rows);
        for (int group_row = 0; group_row < rows; group_row += kGroupRows) {
          const int whole_parts = seen.end(group_row) / part_rows;
          const int group_rows = min_of(kGroupRows, rows - group_row);
          for (int part = 0; part * part_rows < call.kv_len; ++part) {
            if (part >= whole_parts || part < cut_parts) continue;
            CHECK(is_whole(call, first + group_row, group_rows, part * part_rows, part_rows));
          }
        }
      }
    });
  });
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
