// How the portable score kernels cut packed sequences up: every row and chunk of keys once, as in a
// call of the sequence alone; and what of them is left in a window.
#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "check.h"
#include "common/block_grid.h"
#include "cuda/score/problem.h"
#include "sequences.h"

namespace proxyattn::cuda {
namespace {

using test::Lengths;
using test::mixed_lengths;
using test::PackedTable;

constexpr int kChunkStep = 3;
constexpr int64_t kLists = 2;

ScoreProblem make_problem(const PackedTable& packed, ScorePass pass, bool causal) {
  const SequenceParams& s = packed.params;
  ScoreProblem p{};
  p.lists = p.proxy_heads = kLists;
  p.stride = static_cast<int>(s.stride);
  p.block_rows = static_cast<int>(s.q_block / s.stride);
  p.block_keys = static_cast<int>(s.kv_block / s.stride);
  const int tile_blocks = kScoreTileRows / p.block_rows;
  p.packed_tiles = {packed.table, tile_blocks};
  p.num_row_tiles = QueryRuns::capacity(packed.table.max_q_blocks, tile_blocks, packed.table.count);
  p.num_q_blocks = packed.table.max_q_blocks;
  p.num_kv_blocks = ceil_div(s.max_kv_len, s.kv_block);
  p.chunk_step = kChunkStep;
  p.pass = pass;
  p.causal = causal;
  return p;
}

// What a call of one sequence alone is told.
ScoreSource source_alone(const ScoreProblem& packed, const Lengths& length, ScorePass pass) {
  ScoreSource s{};
  s.position = length.kv - length.q;
  s.num_rows = ceil_div(length.q, packed.stride);
  s.num_keys = ceil_div(length.kv, packed.stride);
  s.chunk_keys = score_chunk_keys(pass, s.num_keys);
  return s;
}

// Chunks that the grid visits, by list, row of the output's first query block, and chunk.
using Visits = std::map<std::tuple<int64_t, int64_t, int>, int>;

Visits visit(const ScoreProblem& p) {
  Visits visits;
  for (int64_t idx = 0; idx < p.lists * p.chunk_step * p.num_row_tiles; ++idx) {
    const ScorePlace place(p, idx);
    const ScoreSource source = p.packed_source(place.tile);
    ScoreWork work = place.work(source);
    if (work.first_row >= source.num_rows) continue;
    for (; work.chunk < source.num_chunks(); work.chunk += p.chunk_step) {
      const int64_t block = source.first_q_block + work.first_row / p.block_rows;
      CHECK(block < p.num_q_blocks);
      ++visits[{work.list, block, work.chunk}];
    }
  }
  return visits;
}

void check_sequences(const std::vector<Lengths>& lengths, int64_t block, int64_t stride) {
  for (const ScorePass pass : {ScorePass::kLse, ScorePass::kCells}) {
    for (const bool causal : {false, true}) {
      const PackedTable packed(lengths, block, block, stride, 700);
      const ScoreProblem p = make_problem(packed, pass, causal);
      Visits visits = visit(p);
      for (std::size_t i = 0; i < lengths.size(); ++i) {
        const ScoreSource source = p.source(packed[i]);
        const ScoreSource alone = source_alone(p, lengths[i], pass);
        CHECK_EQ(source.num_rows, alone.num_rows);
        CHECK_EQ(source.num_keys, alone.num_keys);
        CHECK_EQ(source.chunk_keys, alone.chunk_keys);
        CHECK_EQ(source.num_q_blocks, ceil_div<int64_t>(lengths[i].q, block));
        CHECK_EQ(source.num_kv_blocks, ceil_div<int64_t>(lengths[i].kv, block));
        CHECK(pass == ScorePass::kCells || source.num_chunks() <= kMaxLseChunks);
        for (int64_t row = 0; row <= source.num_rows; ++row) {
          CHECK_EQ(p.visible_keys(source, row), p.visible_keys(alone, row));
        }
        for (int64_t list = 0; list < kLists; ++list) {
          for (int64_t row = 0; row < source.num_rows; row += kScoreTileRows) {
            const int64_t first_block = source.first_q_block + row / p.block_rows;
            for (int chunk = 0; chunk < source.num_chunks(); ++chunk) {
              CHECK_EQ((visits[{list, first_block, chunk}]), 1);
              visits.erase({list, first_block, chunk});
            }
          }
        }
      }
      CHECK(visits.empty());
    }
  }
}

TEST(every_row_tile_meets_every_chunk_of_its_keys_once) {
  for (const int64_t stride : {1, 4, 8}) {
    for (const int64_t block : {64, 128}) {
      check_sequences(mixed_lengths(), block, stride);
      check_sequences({{3000, 9000}, {1, 70000}, {2000, 1000}}, block, stride);
    }
  }
}

// Calls check(problem, sequence, its source) in windows around blocks, chunks and all there is.
template <typename Check>
void for_windows(ScorePass pass, const Check& check) {
  for (const int64_t stride : {1, 8}) {
    for (const int64_t block : {64, 128}) {
      const PackedTable packed(mixed_lengths(), block, block, stride);
      ScoreProblem p = make_problem(packed, pass, true);
      for (const int64_t window : {1, 63, 64, 65, 200, 600, 4097, 5000}) {
        p.visibility = Visibility<int64_t>(true, window);
        for (int32_t i = 0; i < packed.table.count; ++i) {
          check(p, window, packed.table.sequences[i]);
        }
      }
    }
  }
}

TEST(a_window_hides_the_key_blocks_that_a_query_block_does_not_see) {
  for_windows(ScorePass::kLse, [](const ScoreProblem& p, int64_t window, const Sequence& s) {
    const ScoreSource source = p.source(s);
    const int64_t block = p.block_rows * p.stride;
    const BlockGrid grid{s.q_len, s.kv_len, block, block, s.offset, true, window};
    for (int64_t row = 0; row < source.num_rows; ++row) {
      if (p.visible_keys(source, row) == 0) continue;
      const int64_t blocks = grid.first_visible(row / p.block_rows);
      CHECK_EQ(int64_t{p.hidden_keys(source, row)}, blocks * p.block_keys);
    }
  });
}

bool sees(const ScoreChunk& chunk, int64_t row, int key) {
  return chunk.p.hidden_keys(chunk.source, row) <= key &&
         key < chunk.p.visible_keys(chunk.source, row);
}

// Key tiles outside those that are computed are nobody's, and those without a mask are whole.
void check_chunk(const ScoreChunk& chunk) {
  const int begin = chunk.begin_key();
  const int end = chunk.end_key();
  const int chunk_end = chunk.first_key() + chunk.source.chunk_keys;
  CHECK(begin % kScoreTileKeys == 0 && begin >= chunk.first_key());
  for (int key = chunk.first_key(); key < chunk_end; key += kScoreTileKeys) {
    const bool computed = begin <= key && key < end;
    const bool masked = key + kScoreTileKeys > chunk.unmasked_keys() || key < chunk.cut_keys();
    for (int64_t row = chunk.work.first_row; row < chunk.work.first_row + kScoreTileRows; ++row) {
      for (const int column : {0, 7, 8, kScoreTileKeys - 1}) {
        const bool seen = sees(chunk, row, key + column);
        CHECK(computed || !seen);
        CHECK(!computed || masked || seen);
      }
    }
  }
}

TEST(key_tiles_outside_a_window_are_left_out) {
  for_windows(ScorePass::kCells, [](const ScoreProblem& p, int64_t, const Sequence& s) {
    const ScoreSource source = p.source(s);
    for (int64_t row = 0; row < source.num_rows; row += kScoreTileRows) {
      for (int i = 0; i < source.num_chunks(); ++i) {
        const ScoreWork work{0, row, i};
        const ScoreChunk chunk{p, source, work};
        check_chunk(chunk);
        for (int m = 0; m < kScoreTileRows / p.block_rows; ++m) {
          for (int n = 0; n < source.chunk_keys / p.block_keys; ++n) {
            const int hidden = p.hidden_keys(source, row + m * p.block_rows);
            CHECK_EQ(chunk.shows(m, n), chunk.first_key() + n * p.block_keys >= hidden);
          }
        }
      }
    }
  });
}

TEST(chunks_whose_sums_a_row_adds_up_are_computed) {
  for_windows(ScorePass::kLse, [](const ScoreProblem& p, int64_t, const Sequence& s) {
    const ScoreSource source = p.source(s);
    for (int64_t row = 0; row < source.num_rows; ++row) {
      const int first = p.hidden_keys(source, row) / source.chunk_keys;
      const int end = ceil_div(p.visible_keys(source, row), source.chunk_keys);
      for (int i = first; i < end; ++i) {
        const ScoreWork work{0, row / kScoreTileRows * kScoreTileRows, i};
        const ScoreChunk chunk{p, source, work};
        CHECK(chunk.begin_key() < chunk.end_key());
      }
    }
  });
}

TEST(what_a_row_sees_by_hand) {
  const PackedTable packed({{5, 5}, {10, 30}, {30, 10}}, 64, 64, 4);
  const ScoreProblem p = make_problem(packed, ScorePass::kLse, true);
  const ScoreSource later = p.source(packed[1]);
  CHECK_EQ(later.first_query, int64_t{16});
  CHECK_EQ(later.first_key, int64_t{128});
  CHECK_EQ(later.num_keys, 8);
  CHECK_EQ(p.visible_keys(later, 0), 6);  // position 20 is key 5's
  CHECK_EQ(p.visible_keys(later, 2), 8);
  const ScoreSource early = p.source(packed[2]);  // its queries begin at position -20
  CHECK_EQ(p.visible_keys(early, 4), 0);
  CHECK_EQ(p.visible_keys(early, 5), 1);
  CHECK_EQ(p.visible_keys(early, 7), 3);
}

TEST(what_a_window_hides_by_hand) {
  const PackedTable packed({{5, 5}, {200, 400}}, 64, 64, 4);
  ScoreProblem p = make_problem(packed, ScorePass::kLse, true);
  const ScoreSource source = p.source(packed[1]);
  CHECK_EQ(p.hidden_keys(source, 0), 0);
  p.visibility = Visibility<int64_t>(true, 100);
  // Its blocks' first queries, at 200, 264, 328 and 392, see keys from 101, 165, 229 and 293 on.
  CHECK_EQ(p.hidden_keys(source, 0), 16);
  CHECK_EQ(p.hidden_keys(source, 15), 16);
  CHECK_EQ(p.hidden_keys(source, 16), 32);
  CHECK_EQ(p.hidden_keys(source, 32), 48);
  CHECK_EQ(p.hidden_keys(source, 49), 64);
}

TEST(chunks_depend_on_the_keys_alone) {
  CHECK_EQ(score_chunk_keys(ScorePass::kCells, 1), 512);
  CHECK_EQ(score_chunk_keys(ScorePass::kCells, 16384), 1024);
  CHECK_EQ(score_chunk_keys(ScorePass::kLse, 16383), 512);
  CHECK_EQ(score_chunk_keys(ScorePass::kLse, 32768), 1024);
  CHECK_EQ(score_chunk_keys(ScorePass::kLse, 32769), 1536);
}

}  // namespace
}  // namespace proxyattn::cuda

int main() {
  return proxyattn::test::run_all();
}
