// How the portable score kernels cut packed sequences up: every row and chunk of keys once, as in a
// call of the sequence alone.
#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "check.h"
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
