// The order in which the portable attention kernel takes query tiles: every tile once, long ones
// first, heads that read the same keys together, in a batch and in packed sequences.
#include <algorithm>
#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda/attention/schedule.h"
#include "sequences.h"

namespace proxyattn::cuda {
namespace {

AttentionParams make_params(int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t q_len) {
  AttentionParams p{};
  p.batch = batch;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.q_len = q_len;
  p.kv_len = q_len;
  p.head_dim = 64;
  p.q_block = 128;
  p.rows = {0, ceil_div(q_len, p.q_block)};
  return p;
}

std::vector<QueryTile> all_tiles(const TileSchedule& schedule) {
  std::vector<QueryTile> tiles;
  const auto count = static_cast<uint32_t>(schedule.num_thread_blocks());
  for (uint32_t i = 0; i < count; ++i) tiles.push_back(schedule.tile(i));
  return tiles;
}

// Keys and values of one head of these params.
int64_t pair_bytes(const AttentionParams& p) {
  return 2 * p.kv_len * p.head_dim * int64_t{2};
}

TEST(every_tile_is_taken_once) {
  for (const int64_t tile_rows : {64, 128}) {
    for (const int64_t pairs_in_section : {1, 4, 5, 100}) {
      const AttentionParams p = make_params(3, 6, 3, 1000);
      const TileSchedule schedule = make_schedule(p, tile_rows, pairs_in_section * pair_bytes(p));
      std::set<std::tuple<int, int, int>> seen;
      int64_t queries = 0;
      for (const QueryTile& tile : all_tiles(schedule)) {
        CHECK(seen.insert({tile.batch_idx, tile.head_idx, tile.first_query}).second);
        CHECK(0 <= tile.batch_idx && tile.batch_idx < p.batch);
        CHECK(0 <= tile.head_idx && tile.head_idx < p.q_heads);
        CHECK_EQ(int64_t{tile.q_block_idx}, tile.first_query / p.q_block);
        queries += std::max(tile.num_queries, 0);
      }
      CHECK_EQ(queries, p.batch * p.q_heads * p.q_len);
    }
  }
}

TEST(tiles_of_a_row_range_lie_inside_it) {
  AttentionParams p = make_params(1, 2, 1, 1000);
  p.rows = {3, 6};
  const TileSchedule schedule = make_schedule(p, 64, 0);
  CHECK_EQ(schedule.num_thread_blocks(), int64_t{2 * 3 * 2});
  for (const QueryTile& tile : all_tiles(schedule)) {
    CHECK(3 * 128 <= tile.first_query && tile.first_query < 6 * 128);
    CHECK_EQ(tile.num_queries, 64);
  }
}

TEST(a_section_runs_from_the_last_tile_to_the_first) {
  const AttentionParams p = make_params(1, 4, 2, 512);
  const std::vector<QueryTile> tiles = all_tiles(make_schedule(p, 128, 2 * pair_bytes(p)));
  for (std::size_t i = 1; i < tiles.size(); ++i) {
    CHECK(tiles[i].first_query <= tiles[i - 1].first_query);
  }
  for (int head = 0; head < 4; ++head) {
    CHECK_EQ(tiles[static_cast<std::size_t>(head)].head_idx, head);
    CHECK_EQ(tiles[static_cast<std::size_t>(head)].first_query, 384);
  }
}

TEST(key_value_heads_that_do_not_fit_together_run_one_after_another) {
  const AttentionParams p = make_params(1, 4, 2, 512);
  const std::vector<QueryTile> tiles = all_tiles(make_schedule(p, 128, pair_bytes(p)));
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    CHECK_EQ(tiles[i].head_idx / 2, i < tiles.size() / 2 ? 0 : 1);
  }
}

TEST(nothing_to_attend_gives_no_tiles) {
  CHECK_EQ(make_schedule(make_params(0, 4, 2, 512), 128, 0).num_thread_blocks(), int64_t{0});
  CHECK_EQ(make_schedule(make_params(1, 4, 2, 0), 128, 0).num_thread_blocks(), int64_t{0});
}

using test::Lengths;
using test::PackedTable;

PackedSchedule make_packed(const PackedTable& packed,
                           int64_t q_heads,
                           int64_t kv_heads,
                           int64_t tile_rows,
                           int64_t cached_keys) {
  static const int32_t some_start = 0;
  AttentionParams p = make_params(packed.params.count, q_heads, kv_heads, packed.params.max_q_len);
  p.q_block = packed.params.q_block;
  p.kv_len = packed.params.max_kv_len;
  p.packed = packed.params.packed;
  p.packed.q_starts = &some_start;
  p.rows = {0, packed.table.max_q_blocks};
  return make_packed_schedule(p, tile_rows, cached_keys * key_bytes(p));
}

// The tiles of one sequence, in the order that they are taken in.
std::vector<QueryTile> tiles_of(const PackedSchedule& schedule, int32_t idx) {
  std::vector<QueryTile> tiles;
  for (int64_t i = 0; i < schedule.num_thread_blocks(); ++i) {
    QueryTile tile;
    const Sequence* found = schedule.find(static_cast<uint32_t>(i), tile);
    if (found != nullptr && found->idx == idx) tiles.push_back(tile);
  }
  return tiles;
}

bool same_tile(const QueryTile& a, const QueryTile& b) {
  return a.batch_idx == b.batch_idx && a.head_idx == b.head_idx && a.q_block_idx == b.q_block_idx &&
         a.first_query == b.first_query && a.num_queries == b.num_queries;
}

TEST(a_packed_sequence_has_the_tiles_of_a_call_of_its_own) {
  const std::vector<Lengths> lengths = {{0, 0},    {1, 1},   {300, 128}, {0, 300}, {129, 700},
                                        {200, 13}, {64, 64}, {65, 4097}, {300, 64}};
  for (const int64_t q_block : {64, 128}) {
    for (const int64_t tile_rows : {int64_t{64}, q_block}) {
      for (const int64_t cached_keys : {0, 700, 2000}) {
        const PackedTable packed(lengths, q_block, 64, 4, 500);
        const PackedSchedule schedule = make_packed(packed, 6, 3, tile_rows, cached_keys);
        for (std::size_t i = 0; i < lengths.size(); ++i) {
          AttentionParams alone = make_params(1, 6, 3, lengths[i].q);
          alone.kv_len = lengths[i].kv;
          alone.q_block = q_block;
          alone.rows.end = ceil_div(alone.q_len, q_block);
          const std::vector<QueryTile> expected =
              all_tiles(make_schedule(alone, tile_rows, cached_keys * key_bytes(alone)));
          const std::vector<QueryTile> got = tiles_of(schedule, static_cast<int32_t>(i));
          CHECK_EQ(got.size(), expected.size());
          for (std::size_t t = 0; t < std::min(got.size(), expected.size()); ++t) {
            CHECK(same_tile(got[t], expected[t]));
          }
        }
      }
    }
  }
}

TEST(packed_sequences_come_from_the_longest_keys_down) {
  const PackedTable packed({{64, 100}, {64, 900}, {0, 1000}, {64, 500}}, 64, 64, 4);
  const PackedSchedule schedule = make_packed(packed, 1, 1, 64, 0);
  CHECK_EQ(schedule.num_thread_blocks(), int64_t{3 + 4});  // blocks that there could be
  const int expected[] = {1, 3, 0};
  QueryTile tile;
  for (uint32_t i = 0; i < 3; ++i) {
    const Sequence* found = schedule.find(i, tile);
    CHECK(found != nullptr && found->idx == expected[i]);
  }
  for (uint32_t i = 3; i < 7; ++i) CHECK(schedule.find(i, tile) == nullptr);
}

}  // namespace
}  // namespace proxyattn::cuda

int main() {
  return proxyattn::test::run_all();
}
