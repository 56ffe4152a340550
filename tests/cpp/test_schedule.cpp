// The order in which the CUDA attention kernels take query tiles: every tile once, long ones first,
// heads that read the same keys together.
#include <algorithm>
#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda/attention/schedule.h"

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

}  // namespace
}  // namespace proxyattn::cuda

int main() {
  return proxyattn::test::run_all();
}
