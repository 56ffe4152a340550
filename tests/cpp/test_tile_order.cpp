// The order in which the sm90 attention kernels take query tiles: every query head of every query
// block exactly once, with its own keys, counts and list, whatever divides what.
#include <cstdint>
#include <vector>

#include "check.h"
#include "cuda/attention/sm90/tile_order.h"

namespace proxyattn::cuda::sm90 {
namespace {

constexpr int64_t kFirstRow = 2;
constexpr int64_t kNumRows = 3;
constexpr int64_t kKeyBytes = 2 * 1000 * 64 * int64_t{2};  // keys and values of one kv head

AttentionParams make_params(int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t list_heads) {
  static const int32_t some_list = 0;
  AttentionParams p{};
  p.batch = batch;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.list_heads = list_heads;
  p.kv_len = 1000;
  p.head_dim = 64;
  p.rows = p.list_rows = {kFirstRow, kFirstRow + kNumRows};
  p.indices = &some_list;
  return p;
}

// Heads of the tile, as find_pair hands them out where all counts are the same.
std::vector<int> heads_of(const TileOrder& order, const TilePlace& place, int tile_heads) {
  std::vector<int> heads;
  for (int i = place.pair * tile_heads; i < (place.pair + 1) * tile_heads; ++i) {
    if (i < order.pair_group) heads.push_back(place.head + i);
  }
  return heads;
}

void check_head(const AttentionParams& p,
                const TileOrder& order,
                const TilePlace& place,
                int head) {
  const int64_t batch = place.batch;
  CHECK_EQ(int64_t{place.kv_head}, head / (p.q_heads / p.kv_heads));
  const int64_t list_head = batch * p.list_heads + head / (p.q_heads / p.list_heads);
  CHECK_EQ(place.list_idx(order), list_head);
  const int64_t in_group = head - place.head;
  CHECK_EQ(place.head_idx(order) + in_group, batch * p.q_heads + head);
}

void check_order(const AttentionParams& p, int tile_heads, int64_t section_heads) {
  const TileOrder order = make_tile_order(p, tile_heads, section_heads * kKeyBytes);
  std::vector<int> times(static_cast<std::size_t>(p.batch * p.q_heads * kNumRows));
  int last_row = order.row_begin + order.num_rows;
  for (int tile = 0; tile < order.num_tiles; ++tile) {
    const TilePlace place(order, tile);
    if (section_heads >= p.batch * p.kv_heads) CHECK(place.row <= last_row);
    last_row = place.row;
    for (const int head : heads_of(order, place, tile_heads)) {
      const int64_t row = place.row - kFirstRow;
      const bool inside = 0 <= place.batch && place.batch < p.batch && 0 <= head &&
                          head < p.q_heads && 0 <= row && row < kNumRows;
      CHECK(inside);
      if (!inside) continue;
      ++times[static_cast<std::size_t>((place.batch * p.q_heads + head) * kNumRows + row)];
      check_head(p, order, place, head);
    }
  }
  for (const int count : times) CHECK_EQ(count, 1);
}

TEST(every_query_head_once_with_its_own_list) {
  for (int64_t q_heads = 1; q_heads <= 32; ++q_heads) {
    for (int64_t kv_heads = 1; kv_heads <= q_heads; ++kv_heads) {
      for (int64_t list_heads = 1; list_heads <= q_heads; ++list_heads) {
        if (q_heads % kv_heads != 0 || q_heads % list_heads != 0) continue;
        for (const int64_t batch : {1, 2}) {
          const AttentionParams p = make_params(batch, q_heads, kv_heads, list_heads);
          for (const int tile_heads : {1, 2}) {  // blocks of 128 rows, and of 64
            for (const int64_t section_heads : {1, 3, 100}) {
              check_order(p, tile_heads, section_heads);
            }
          }
        }
      }
    }
  }
}

TEST(groups_by_hand) {
  // Heads {0, 1}, {2, 3}, {4, 5} share lists, {0, 1, 2}, {3, 4, 5} keys: a group would take head 3
  // for one of kv head 0.
  CHECK_EQ(pair_group(make_params(1, 6, 2, 3)), 1);
  CHECK_EQ(pair_group(make_params(1, 12, 6, 4)), 1);
  CHECK_EQ(pair_group(make_params(1, 12, 4, 6)), 1);
  CHECK_EQ(pair_group(make_params(1, 24, 2, 3)), 4);
  CHECK_EQ(pair_group(make_params(1, 28, 4, 14)), 1);
  CHECK_EQ(pair_group(make_params(1, 32, 8, 8)), 4);
  CHECK_EQ(pair_group(make_params(1, 32, 8, 2)), 4);
  CHECK_EQ(pair_group(make_params(1, 32, 2, 8)), 4);
}

TEST(groups_that_a_warp_can_tell_apart) {
  CHECK_EQ(pair_group(make_params(1, 32, 1, 1)), 32);
  CHECK_EQ(pair_group(make_params(1, 33, 1, 1)), 11);
  CHECK_EQ(pair_group(make_params(1, 96, 1, 1)), 32);
  CHECK_EQ(pair_group(make_params(1, 37, 1, 1)), 1);
  check_order(make_params(1, 66, 1, 1), 2, 1);
}

TEST(without_lists_all_heads_of_a_kv_head_go_together) {
  AttentionParams p = make_params(1, 32, 8, 32);
  p.indices = nullptr;
  CHECK_EQ(pair_group(p), 4);
}

}  // namespace
}  // namespace proxyattn::cuda::sm90

int main() {
  return proxyattn::test::run_all();
}
