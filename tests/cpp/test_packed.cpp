// How the CUDA kernels find things of packed sequences: windows of the proxies, keys in pages, the
// rows that a class of the selector takes, and blocks in the scratch of estimate_needs.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "check.h"
#include "common/block_grid.h"
#include "cuda/needs/layout.h"
#include "cuda/needs/problem.h"
#include "cuda/pool/windows.h"
#include "cuda/select/rows.h"
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

constexpr int64_t kWindows[] = {0, 1, 64, 65, 300, 5000};  // 0: none

SelectArgs make_select_args(const PackedTable& packed,
                            int64_t num_lists,
                            int64_t list_heads,
                            int64_t window = 0) {
  // Rows only point into them: room for every place that a case names.
  static float scores[1 << 22];
  static int32_t lists[1 << 22];
  const SequenceParams& p = packed.params;
  SelectArgs args{};
  args.grid = {p.max_q_len, p.max_kv_len, p.q_block, p.kv_block, 0, true, window};
  args.packed = packed.table;
  args.num_sink_blocks = 1;
  args.num_local_blocks = 1;
  args.num_lists = num_lists;
  args.scores = args.lists = {0, packed.table.max_q_blocks};
  args.num_blocks = args.list_capacity = args.grid.num_kv_blocks();
  args.list_heads = list_heads;
  args.peak = args.mass = scores;
  args.indices = args.counts = lists;
  return args;
}

// The same query block in a call of its sequence alone.
BlockGrid own_grid(const PackedTable& packed, const Sequence& s, int64_t window) {
  const SequenceParams& p = packed.params;
  return {s.q_len, s.kv_len, p.q_block, p.kv_block, s.kv_len - s.q_len, true, window};
}

void check_rows_of_sequences(int64_t window) {
  const PackedTable packed(mixed_lengths(), 64, 128, 4, 1000);
  constexpr int64_t kLists = 3;
  constexpr int64_t kListHeads = 2;
  const SelectArgs args = make_select_args(packed, kLists, kListHeads, window);
  for (int32_t i = 0; i < packed.table.count; ++i) {
    const Sequence& s = packed.table.sequences[i];
    const BlockGrid grid = own_grid(packed, s, window);
    for (int64_t m = 0; m < grid.num_q_blocks(); ++m) {
      const int64_t block = s.first_q_block + m;
      for (int64_t list = 0; list < kLists; ++list) {
        const Row row(args, list, block);
        const ForcedBlocks forced(grid, m, 1, 1);
        CHECK_EQ(int64_t{row.visible}, grid.num_visible(m));
        CHECK_EQ(row.forced.first, forced.first);
        CHECK_EQ(row.forced.local_begin, forced.local_begin);
        CHECK_EQ(int64_t{row.num_forced}, forced.count());
        CHECK_EQ(row.first_need, (i * kLists + list) * kListHeads);
        const int64_t place = list * args.scores.count + block;
        CHECK_EQ(row.peak - args.peak, place * args.num_blocks);
        CHECK_EQ(row.mass - args.mass, place * args.num_blocks);
        CHECK_EQ(row.ranking - args.indices, place * args.list_capacity);
        CHECK_EQ(row.counts - args.counts, list * kListHeads * args.lists.count + block);
        CHECK_EQ(int64_t{row.list_end}, args.list_capacity);
      }
    }
  }
}

TEST(a_packed_row_is_that_of_its_sequence_alone) {
  for (const int64_t window : kWindows) check_rows_of_sequences(window);
}

TEST(lists_of_a_part_lie_among_those_of_all) {
  const PackedTable packed(mixed_lengths(), 64, 128, 4);
  SelectArgs args = make_select_args(packed, 3, 2);
  args.list_capacity += 5;
  args.lists = {-10, 100};  // the part begins with query block 10 of 100
  for (int64_t block = 0; block < packed.table.max_q_blocks; ++block) {
    if (packed.table.block_sequence[block] == packed.table.count) break;
    const Row row(args, 2, block);
    CHECK_EQ(row.peak - args.peak, (2 * args.scores.count + block) * args.num_blocks);
    CHECK_EQ(row.ranking - args.indices, (2 * 100 + 10 + block) * args.list_capacity);
    CHECK_EQ(row.counts - args.counts, 2 * 2 * 100 + 10 + block);
  }
}

TEST(a_class_takes_the_rows_of_its_size) {
  for (const int64_t window : kWindows) {
    const PackedTable packed(mixed_lengths(), 64, 64, 4, window);  // some spare room, or none
    const SelectArgs args = make_select_args(packed, 2, 1, window);
    const int64_t num_units = args.scores.count * args.num_lists;
    std::vector<int> times(static_cast<std::size_t>(num_units));
    int too_short = -1;
    for (const int capacity : {1, 4, 64, 128}) {
      const RowClass rows{0, too_short, capacity};
      for (int64_t i = 0; i < num_units; ++i) {
        const RowClass::Unit unit = rows.unit(args, i);
        const RowClass::Match match = rows.match(args, unit.block);
        const bool exists = packed.table.block_sequence[unit.block] < packed.table.count;
        CHECK_EQ(match == RowClass::Match::kNoneLeft, !exists);
        if (match != RowClass::Match::kYes) continue;
        const int visible = Row(args, unit.list, unit.block).visible;
        CHECK(too_short < visible && visible <= capacity);
        ++times[static_cast<std::size_t>(unit.list * args.scores.count + unit.block)];
      }
      CHECK(rows.match(args, rows.unit(args, num_units).block) == RowClass::Match::kNoneLeft);
      too_short = capacity;
    }
    for (std::size_t i = 0; i < times.size(); ++i) {
      const auto block = static_cast<int64_t>(i) % args.scores.count;
      const bool exists = packed.table.block_sequence[block] < packed.table.count;
      CHECK_EQ(times[i], exists ? 1 : 0);
    }
  }
}

TEST(lists_that_stay_inside_end_where_readers_do) {
  const PackedTable packed({{64, 64}, {64, 64 * 40}, {1, 64 * 100}}, 64, 64, 4);
  SelectArgs args = make_select_args(packed, 1, 1);
  args.only_prefixes = true;
  CHECK_EQ(Row(args, 0, 0).list_end, 32);
  CHECK_EQ(Row(args, 0, 1).list_end, 64);
  CHECK_EQ(Row(args, 0, 2).list_end, 100);
}

TEST(rows_of_a_batch_go_down_from_the_end) {
  SelectArgs args{};
  args.grid = {640, 640, 64, 64, 0, true};
  args.num_lists = 3;
  args.scores = {4, 6};
  const RowClass rows{9, 0, 0};
  CHECK_EQ(rows.unit(args, 0).block, int64_t{8});
  CHECK_EQ(rows.unit(args, 2).block, int64_t{8});
  CHECK_EQ(rows.unit(args, 2).list, int64_t{2});
  CHECK_EQ(rows.unit(args, 3).block, int64_t{7});
  CHECK_EQ(Row(args, 1, 7).visible, 8);
}

// Each block of each sequence lies in one run, which belongs to that sequence.
template <int32_t Sequence::* kFirstBlock, typename Count>
void check_runs(const PackedTable& packed, int64_t max_blocks, const Count& count_blocks) {
  for (const int32_t run_blocks : {1, 2, 3, 64}) {
    const BlockRuns<kFirstBlock> runs{packed.table, run_blocks};
    const int64_t capacity = runs.capacity(max_blocks, run_blocks, packed.table.count);
    int32_t behind = 0;  // the runs so far
    for (int32_t i = 0; i < packed.table.count; ++i) {
      const Sequence& s = packed.table.sequences[i];
      CHECK(runs.first_run(s) >= behind);
      const int64_t blocks = count_blocks(s);
      behind = runs.first_run(s) + static_cast<int32_t>(ceil_div<int64_t>(blocks, run_blocks));
      for (int32_t run = runs.first_run(s); run < behind; ++run) {
        CHECK_EQ(runs.owner(run).idx, i);
      }
    }
    CHECK(behind <= capacity);
    CHECK(runs.owner(static_cast<int32_t>(capacity) + 5).idx < packed.table.count);
  }
}

TEST(runs_of_blocks_are_of_one_sequence) {
  const PackedTable packed(mixed_lengths(), 64, 128, 4);
  check_runs<&Sequence::first_q_block>(packed, packed.table.max_q_blocks,
                                       [&](const Sequence& s) { return ceil_div(s.q_len, 64); });
  const int64_t max_kv_blocks = packed.params.packed.max_total_kv / 128 + packed.table.count;
  check_runs<&Sequence::first_kv_block>(packed, max_kv_blocks,
                                        [&](const Sequence& s) { return ceil_div(s.kv_len, 128); });
}

NeedParams make_need_params(const PackedTable& packed, int64_t window = 0) {
  static const int32_t some_start = 0;
  NeedParams p{};
  p.batch = packed.params.count;
  p.q_len = packed.params.max_q_len;
  p.kv_len = packed.params.max_kv_len;
  p.q_heads = 4;
  p.kv_heads = 2;
  p.head_dim = 64;
  p.q_block = packed.params.q_block;
  p.kv_block = packed.params.kv_block;
  p.packed = packed.params.packed;
  p.packed.q_starts = &some_start;
  p.causal = true;
  p.window = window;
  return p;
}

TEST(needs_keep_the_key_blocks_of_sequences_apart) {
  for (const int64_t spare : {0, 3000}) {
    const PackedTable packed(mixed_lengths(), 64, 64, 4, spare);
    const NeedParams params = make_need_params(packed);
    const NeedLayout layout(params);
    std::vector<int> times(static_cast<std::size_t>(layout.num_kv_blocks));
    for (int64_t part = 0; part < layout.num_parts; ++part) {
      const NeedSpan span = layout.span_of_part(part);
      const int64_t own = part - span.first_part;
      if (own >= span.num_parts) continue;
      const int64_t end = std::min<int64_t>((own + 1) * kBlocksPerPart, span.num_blocks);
      for (int64_t n = own * kBlocksPerPart; n < end; ++n) {
        ++times[static_cast<std::size_t>(span.first_block + n)];
      }
    }
    int64_t counted = 0;
    for (const int count : times) counted += count;
    for (int32_t i = 0; i < packed.table.count; ++i) {
      const Sequence& s = packed.table.sequences[i];
      const HeadMass masses = layout.head_mass(i * layout.q_heads + 3);
      CHECK_EQ(masses.num_blocks, s.q_len == 0 ? 0 : ceil_div(s.kv_len, 64));
      CHECK_EQ(masses.blocks - layout.mass, 3 * layout.num_kv_blocks + s.first_kv_block);
      for (int n = 0; n < masses.num_blocks; ++n, --counted) {
        CHECK_EQ(times[static_cast<std::size_t>(s.first_kv_block + n)], 1);
      }
    }
    CHECK_EQ(counted, int64_t{0});
  }
}

TEST(needs_leave_out_the_key_blocks_that_a_window_hides) {
  for (const int64_t window : kWindows) {
    const PackedTable packed(mixed_lengths(), 128, 64, 4);
    const NeedLayout layout(make_need_params(packed, window));
    for (int32_t i = 0; i < packed.table.count; ++i) {
      const Sequence& s = packed.table.sequences[i];
      if (s.q_len == 0) continue;
      const BlockGrid grid = own_grid(packed, s, window);
      const int64_t hidden = grid.first_visible(grid.last_queries());
      CHECK_EQ(int64_t{layout.span_of(s).hidden_blocks}, hidden);
      NeedParams alone = make_need_params(packed, window);
      alone.batch = 1;
      alone.q_len = s.q_len;
      alone.kv_len = s.kv_len;
      alone.q_offset = s.offset;
      alone.packed = {};
      CHECK_EQ(int64_t{NeedLayout(alone).entry.hidden_blocks}, hidden);
    }
  }
}

TEST(capacities_without_a_sum_of_all_keys) {
  PackedTable packed({{1, 500}, {1, 900}}, 64, 64, 4);
  NeedParams params = make_need_params(packed);
  params.packed.max_total_kv = 0;  // nobody knows
  params.packed.total_kv = 1400;
  const SequenceTable table = packed_table(params);
  CHECK_EQ(table.max_key_units, 1400 / (4 * 128) + 2);
  CHECK_EQ(NeedLayout(params).num_kv_blocks, int64_t{1400 / 64 + 2});
  static const int32_t some_page = 0;
  params.packed.page_table = &some_page;
  CHECK_EQ(packed_table(params).max_key_units, 2 * 900 / (4 * 128) + 2);
  CHECK_EQ(NeedLayout(params).num_kv_blocks, int64_t{2 * 900 / 64 + 2});
}

TEST(needs_of_a_batch_have_rows_of_their_own) {
  NeedParams p{};
  p.batch = 2;
  p.q_len = 40;
  p.kv_len = 5000;
  p.q_heads = 3;
  p.q_block = p.kv_block = 64;
  const NeedLayout layout(p);
  CHECK_EQ(layout.heads, int64_t{6});
  CHECK_EQ(layout.num_kv_blocks, int64_t{79});
  CHECK_EQ(layout.span_of_part(1).num_parts, 2);
  CHECK_EQ(layout.span_of_part(1).rows, 40);
  CHECK_EQ(layout.head_mass(4).blocks - layout.mass, 4 * 79);
  CHECK_EQ(layout.head_mass(4).num_blocks, 79);
}

TEST(chunks_of_keys_name_their_last_queries) {
  const PackedTable packed({{70, 2000}, {0, 500}, {30, 10}}, 64, 64, 4);
  NeedProblem problem{};
  problem.packed_chunks = {packed.table, 16};
  problem.q_block = problem.kv_block = 64;
  problem.entry.causal = true;
  const NeedSource first = problem.source(1);
  CHECK_EQ(first.first_query, int64_t{6});
  CHECK_EQ(first.position, int64_t{1936});
  CHECK_EQ(first.rows, 64);
  CHECK_EQ(first.first_chunk, 0);
  CHECK_EQ(first.visible_keys(63), 2000);
  CHECK_EQ(first.visible_keys(64), 0);
  CHECK_EQ(problem.source(3).num_keys, 0);  // nobody looks at them
  const NeedSource last = problem.source(4);
  CHECK_EQ(last.first_query, int64_t{70});
  CHECK_EQ(last.first_key, int64_t{2500});
  CHECK_EQ(last.first_block, 40);
  CHECK_EQ(last.first_chunk, 4);
  CHECK_EQ(last.visible_keys(19), 0);  // a query before key 0
  CHECK_EQ(last.visible_keys(20), 1);
}

}  // namespace
}  // namespace proxyattn::cuda

int main() {
  return proxyattn::test::run_all();
}
