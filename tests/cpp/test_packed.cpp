// How the CUDA kernels find things of packed sequences: windows of the proxies, and keys in pages.
#include <cstdint>
#include <vector>

#include "check.h"
#include "cuda/pool/windows.h"
#include "cuda/sequences/page_table.h"
#include "sequences.h"

namespace proxyattn::cuda {
namespace {

using test::mixed_lengths;
using test::PackedTable;

PackedWindows make_windows(const PackedTable& packed, int window_tokens) {
  PackedWindows windows;
  windows.table = packed.table;
  windows.pages = PageTable(packed.params.packed);
  windows.stride = static_cast<int>(packed.params.stride);
  windows.window_tokens = window_tokens;
  windows.block_windows = static_cast<int>(packed.params.q_block / packed.params.stride);
  return windows;
}

// Windows [0, end) hold each token that is looked at once, in order, and none else.
template <typename Find>
void check_windows(const std::vector<int64_t>& tokens, int64_t end, const Find& find) {
  std::size_t next = 0;
  bool over = false;
  for (int64_t i = 0; i < end; ++i) {
    const Window window = find(i);
    over = over || window.num_tokens == Window::kNoMore;
    CHECK(!over || window.num_tokens == Window::kNoMore);
    for (int t = 0; t < window.num_tokens; ++t) {
      CHECK_EQ(window.first.entry, int64_t{0});
      CHECK(next < tokens.size() && window.first.token + t == tokens[next]);
      ++next;
    }
  }
  CHECK_EQ(next, tokens.size());
}

TEST(windows_hold_every_token_of_their_sequence_once) {
  for (const int64_t q_block : {64, 128}) {
    for (const int64_t stride : {1, 2, 4, 8}) {
      for (const int64_t spare : {0, 5000}) {
        for (const int window_tokens : {1, static_cast<int>(stride)}) {
          const PackedTable packed(mixed_lengths(), q_block, 64, stride, spare);
          std::vector<int64_t> queries;
          std::vector<int64_t> keys;
          for (int32_t i = 0; i < packed.table.count; ++i) {
            const Sequence& s = packed.table.sequences[i];
            for (int32_t t = 0; t < s.q_len; ++t) {
              if (t % stride < window_tokens) queries.push_back(s.q_start + t);
            }
            for (int32_t t = 0; t < s.kv_len; ++t) {
              if (t % stride < window_tokens) keys.push_back(s.kv_start + t);
            }
          }
          const PackedWindows windows = make_windows(packed, window_tokens);
          check_windows(queries, packed.table.max_q_blocks * (q_block / stride),
                        [&](int64_t i) { return windows.of_queries(i); });
          check_windows(keys, packed.table.max_key_units * kWindowUnit,
                        [&](int64_t i) { return windows.of_keys(i); });
        }
      }
    }
  }
}

TEST(windows_of_a_block_and_of_a_sequence_begin_where_the_scorer_looks) {
  const PackedTable packed({{70, 70}, {0, 0}, {200, 900}}, 64, 64, 4);
  const PackedWindows windows = make_windows(packed, 4);
  CHECK_EQ(windows.of_queries(0).first.token, int64_t{0});
  CHECK_EQ(windows.of_queries(17).num_tokens, 2);             // tokens 68 and 69
  CHECK_EQ(windows.of_queries(18).num_tokens, 0);             // of block 1, behind the sequence
  CHECK_EQ(windows.of_queries(32).first.token, int64_t{70});  // block 2 is the third's first
  CHECK_EQ(windows.of_queries(6 * 16).num_tokens, Window::kNoMore);
  CHECK_EQ(windows.of_keys(17).num_tokens, 2);
  CHECK_EQ(windows.of_keys(18).num_tokens, 0);
  CHECK_EQ(windows.of_keys(128).first.token, int64_t{70});
  CHECK_EQ(windows.of_keys(128 + 225).num_tokens, 0);
  CHECK_EQ(windows.of_keys(3 * 128).num_tokens, Window::kNoMore);
}

TEST(keys_in_pages) {
  PackedTable packed({{1, 40}, {1, 64}}, 64, 64, 4);
  const std::vector<int32_t> pages = {7, 2, 0, -1, 1, 8, 3, 9};  // eight there are
  packed.params.packed.page_table = pages.data();
  packed.params.packed.table_pages = 4;
  packed.params.packed.num_pages = 8;
  packed.params.packed.page_len = 16;
  const PageTable table(packed.params.packed);
  const auto check_place = [&](std::size_t sequence, int32_t key, int64_t page, int64_t token) {
    const TokenPlace place = table.place(packed[sequence], key);
    CHECK_EQ(place.entry, page);
    CHECK_EQ(place.token, token);
  };
  check_place(0, 0, 7, 0);
  check_place(0, 15, 7, 15);
  check_place(0, 16, 2, 0);
  check_place(0, 39, 0, 7);
  check_place(1, 0, 1, 0);
  check_place(1, 47, 3, 15);
  CHECK(!table.place(packed[1], 16).exists());  // page 8 of eight
  CHECK(!table.place(packed[1], 63).exists());
  CHECK(table.place(packed[1], 47).exists());
  CHECK(!table.place(packed[0], 48).exists());  // page -1

  const PackedWindows windows = make_windows(packed, 4);
  CHECK_EQ(windows.of_keys(4).first.entry, int64_t{2});
  CHECK_EQ(windows.of_keys(4).num_tokens, 4);
  CHECK_EQ(windows.of_keys(9).first.token, int64_t{4});
  CHECK(!windows.of_keys(128 + 4).first.exists());
  CHECK_EQ(windows.of_keys(128 + 4).num_tokens, 4);  // there is such a window, of zeros
}

}  // namespace
}  // namespace proxyattn::cuda

int main() {
  return proxyattn::test::run_all();
}
