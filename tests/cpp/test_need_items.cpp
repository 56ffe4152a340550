// How the sm90 kernel of estimate_needs cuts its work up, of a batch and of packed sequences, and
// where it loads key tiles from.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cuda/needs/layout.h"
#include "cuda/needs/sm90/items.h"
#include "cuda/sequences/page_table.h"
#include "cuda/sm90/key_loads.h"
#include "cuda/sm90/logit_config.h"
#include "sequences.h"

namespace proxyattn::cuda::sm90 {
namespace {

using test::Lengths;
using test::mixed_lengths;
using test::PackedTable;

constexpr int kGroups = 4;  // warpgroups of a thread block

NeedParams make_params(int64_t block, int64_t q_heads, int64_t kv_heads) {
  NeedParams p{};
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.head_dim = 64;
  p.q_block = p.kv_block = block;
  p.causal = true;
  return p;
}

NeedParams batch_params(int64_t batch, const Lengths& length, NeedParams p) {
  p.batch = batch;
  p.q_len = length.q;
  p.kv_len = length.kv;
  p.q_offset = length.kv - length.q;
  return p;
}

NeedParams packed_params(const PackedTable& packed, NeedParams p) {
  static const int32_t some_start = 0;
  p.batch = packed.params.count;
  p.q_len = packed.params.max_q_len;
  p.kv_len = packed.params.max_kv_len;
  p.packed = packed.params.packed;
  p.packed.q_starts = &some_start;
  return p;
}

// The items of a call, as a thread block meets them that works alone.
std::vector<NeedItem> all_items(const NeedItems& items) {
  std::vector<NeedItem> all;
  if (!items.is_packed()) {
    for (int i = 0; i < items.num_entry_items(); ++i) all.push_back(items.entry_item(i));
    return all;
  }
  const KeyRuns chunks = items.packed_chunks(items.packed_chunk_tiles());
  for (int i = 0; i < items.num_packed_items(chunks); ++i) {
    const NeedItem item = items.packed_item(chunks, chunks.owner(items.chunk_of_packed_item(i)), i);
    if (item.num_tiles > 0) all.push_back(item);
  }
  return all;
}

// How often each row of each key block is written, in block_lse.
class Writes {
 public:
  Writes(const NeedItems& items, const NeedLayout& layout)
      : items_(items),
        layout_(layout),
        times_(static_cast<std::size_t>(layout.heads * layout.num_kv_blocks * layout.q_block)) {}

  void add(const NeedItem& item) {
    const int num_blocks = ceil_div(item.num_keys, kLogitKeys / items_.tile_blocks);
    const int begin = item.first_tile * items_.tile_blocks;
    const int end = std::min(num_blocks, begin + item.num_tiles * items_.tile_blocks);
    for (int group = 0; group < kGroups; ++group) {
      const NeedRows rows(items_, item.row_tile * kGroups + group);
      if (rows.head >= items_.group_heads) continue;
      for (int n = begin; n < end; ++n) {
        for (int r = 0; r < kGroupRows; ++r) {
          ++times(item.first_head + rows.head, item.first_block + n, rows.row + r);
        }
      }
    }
  }

  // That what the kernels behind this one read of it was written once; forgets it.
  void take(int64_t head, const NeedSpan& span) {
    for (int n = 0; n < span.num_blocks; ++n) {
      for (int64_t r = 0; r < layout_.q_block; ++r) {
        CHECK_EQ(times(head, span.first_block + n, r), 1);
        times(head, span.first_block + n, r) = 0;
      }
    }
  }

  bool empty() const {
    return std::all_of(times_.begin(), times_.end(), [](int times) { return times == 0; });
  }

 private:
  int& times(int64_t head, int64_t block, int64_t row) {
    CHECK(head < layout_.heads && block < layout_.num_kv_blocks && row < layout_.q_block);
    const int64_t place = (head * layout_.num_kv_blocks + block) * layout_.q_block + row;
    return times_[static_cast<std::size_t>(place)];
  }

  const NeedItems& items_;
  const NeedLayout& layout_;
  std::vector<int> times_;
};

struct Heads {
  int64_t q;
  int64_t kv;
};
const std::vector<Heads> kHeads = {{4, 2}, {7, 1}, {6, 3}};

template <typename Check>
void for_each_shape(const Check& check) {
  for (const Heads& heads : kHeads) {
    for (const int64_t block : {64, 128}) {
      for (const int multiprocessors : {1, 3, 132}) {
        check(make_params(block, heads.q, heads.kv), multiprocessors);
      }
    }
  }
}

void check_stretches(const std::vector<NeedItem>& items) {
  for (const NeedItem& item : items) {
    CHECK(item.num_tiles > 0);
    CHECK_EQ(item.first_tile % kStretchTiles, 0);
    const bool ends = item.first_tile + item.num_tiles == ceil_div(item.num_keys, kLogitKeys);
    CHECK(ends || item.num_tiles % kStretchTiles == 0);
  }
}

TEST(items_of_a_batch_write_every_row_once) {
  for (const Lengths& length : std::vector<Lengths>{{1, 1}, {300, 129}, {64, 5000}}) {
    for_each_shape([&](const NeedParams& heads, int multiprocessors) {
      const NeedParams params = batch_params(3, length, heads);
      const NeedLayout layout(params);
      const NeedItems items = make_need_items(params, kGroups, multiprocessors);
      const std::vector<NeedItem> all = all_items(items);
      check_stretches(all);
      Writes writes(items, layout);
      for (const NeedItem& item : all) writes.add(item);
      for (int64_t head = 0; head < layout.heads; ++head) writes.take(head, layout.entry);
      CHECK(writes.empty());
    });
  }
}

const std::vector<std::vector<Lengths>> kPacks = {
    mixed_lengths(),
    {{40, 9000}},
    {{0, 0}, {0, 50}},
    {{3, 1024}, {3, 1025}, {0, 7000}, {200, 3}, {1, 2048}, {70, 12000}}};

TEST(items_of_packed_sequences_write_every_row_once) {
  for (const std::vector<Lengths>& lengths : kPacks) {
    for_each_shape([&](const NeedParams& heads, int multiprocessors) {
      for (const int64_t spare : {0, 3000}) {
        const PackedTable packed(lengths, heads.q_block, heads.kv_block, 4, spare);
        const NeedParams params = packed_params(packed, heads);
        const NeedLayout layout(params);
        const NeedItems items = make_need_items(params, kGroups, multiprocessors);
        const std::vector<NeedItem> all = all_items(items);
        check_stretches(all);
        Writes writes(items, layout);
        for (const NeedItem& item : all) writes.add(item);
        for (int64_t head = 0; head < layout.heads; ++head) {
          for (std::size_t i = 0; i < lengths.size(); ++i) {
            writes.take(head, layout.span_of(packed[i]));
          }
        }
        CHECK(writes.empty());
      }
    });
  }
}

TEST(an_item_knows_what_a_call_of_its_sequence_alone_would) {
  for (const std::vector<Lengths>& lengths : kPacks) {
    for (const int64_t block : {64, 128}) {
      const PackedTable packed(lengths, block, block, 4, 100);
      const NeedParams heads = make_params(block, 4, 2);
      const NeedItems items = make_need_items(packed_params(packed, heads), kGroups, 3);
      for (const NeedItem& item : all_items(items)) {
        const Sequence& s = packed[static_cast<std::size_t>(item.sequence)];
        const NeedItem alone =
            make_need_items(batch_params(1, {s.q_len, s.kv_len}, heads), kGroups, 3).entry_item(0);
        CHECK_EQ(item.num_keys, alone.num_keys);
        CHECK_EQ(item.num_whole, alone.num_whole);
        CHECK_EQ(item.position, alone.position);
        CHECK_EQ(item.first_query, alone.first_query + s.q_start);
        CHECK_EQ(item.first_key, s.kv_start);
        CHECK_EQ(item.first_head, item.kv_head * 2);
        CHECK_EQ(item.batch, 0);
      }
    }
  }
}

TEST(items_of_all_sequences_are_about_as_many_as_are_wanted) {
  NeedItems items{};
  items.wanted_chunks = 33;
  CHECK_EQ(items.choose_chunk_tiles(0), kStretchTiles);
  CHECK_EQ(items.choose_chunk_tiles(33 * kStretchTiles), kStretchTiles);
  CHECK_EQ(items.choose_chunk_tiles(33 * kStretchTiles + 1), 2 * kStretchTiles);
  // Capacities don't decide: the table does.
  const PackedTable packed({{64, 131072}, {64, 131072}}, 64, 64, 4, 1 << 22);
  const NeedParams params = packed_params(packed, make_params(64, 32, 8));
  items = make_need_items(params, kGroups, 132);
  CHECK_EQ(items.row_tiles(), 8);
  CHECK_EQ(items.wanted_chunks, 132);
  CHECK_EQ(items.packed_chunk_tiles(), 2 * kStretchTiles);
  CHECK_EQ(all_items(items).size(), std::size_t{2 * 64 * 8});
}

TEST(in_pages_no_tile_comes_whole) {
  const PackedTable packed({{1, 1000}}, 64, 64, 4);
  NeedParams params = packed_params(packed, make_params(64, 4, 2));
  CHECK_EQ(all_items(make_need_items(params, kGroups, 1))[0].num_whole, 7);
  static const int32_t some_page = 0;
  params.packed.page_table = &some_page;
  CHECK_EQ(all_items(make_need_items(params, kGroups, 1))[0].num_whole, 0);
}

// The map of whole tiles has a dimension of runs and one of their tokens, 16 of which a load takes
// from its start on.
TEST(whole_tiles_begin_at_any_token) {
  for (int first = 0; first < 40; ++first) {
    for (int keys = 0; keys < 400; ++keys) {
      const int tokens = first + keys;  // no more there are
      for (int tile = 0; tile < keys / kLogitKeys; ++tile) {
        const RunPlace place(first + tile * kLogitKeys);
        CHECK(place.token < kRunKeys);
        CHECK(place.run + kTileRuns <= tokens / kRunKeys);
        const int last = (place.run + kTileRuns - 1) * kRunKeys + place.token + kRunKeys - 1;
        CHECK_EQ(place.run * kRunKeys + place.token, first + tile * kLogitKeys);
        CHECK(last < tokens);
      }
    }
  }
}

TEST(loads_of_a_tile_in_pages_cover_it_once) {
  for (int shift = 4; shift <= 8; ++shift) {
    PackedSequences packed{};
    packed.page_len = int64_t{1} << shift;
    const PageTable table(packed);
    const PageLoads loads = PageLoads::of(table.page_shift);
    CHECK_EQ(loads.piece_keys(), std::min(1 << shift, kLogitKeys));
    for (const int boxes : {1, 2, 4}) {
      std::vector<int> times(static_cast<std::size_t>(kLogitKeys * boxes));
      for (int load = 0; load < 32; ++load) {
        const int row = loads.first_key(load, boxes);
        if (row >= kLogitKeys) continue;
        for (int tile = 0; tile < 3; ++tile) {
          const int token = table.token_in_page(tile * kLogitKeys + row);
          CHECK(token + loads.piece_keys() <= 1 << shift);
        }
        for (int key = row; key < row + loads.piece_keys(); ++key) {
          ++times[static_cast<std::size_t>(key * boxes + PageLoads::box(load, boxes))];
        }
      }
      for (const int count : times) CHECK_EQ(count, 1);
    }
  }
}

}  // namespace
}  // namespace proxyattn::cuda::sm90

int main() {
  return proxyattn::test::run_all();
}
