// How the sm90 family of score_blocks cuts calls into passes, and what scratch it asks for.
#include <cstdint>
#include <vector>

#include "check.h"
#include "cuda/score/sm90/plan.h"

namespace {

using namespace proxyattn;
using cuda::sm90::ScorePass;
using cuda::sm90::ScorePlan;

struct Shape {
  int64_t batch;
  int64_t proxy_heads;
  int64_t q_len;
  int64_t kv_len;
  int64_t head_dim;
  int64_t stride;
  int64_t block;
  bool causal;
  bool with_mass;
};

const std::vector<Shape> kShapes = {
    {1, 1, 1, 1, 128, 4, 128, true, false},
    {2, 3, 5000, 7001, 64, 4, 64, true, true},
    {1, 8, 131072, 131072, 128, 4, 128, true, false},
    {1, 8, 262144, 262144, 128, 4, 128, true, true},
    {1, 4, 70000, 300000, 256, 2, 64, true, false},
    {1, 2, 200010, 200000, 128, 4, 64, false, true},
    {40, 8, 16384, 16384, 128, 4, 128, true, false},
    {3, 2, 9000, 4000, 128, 4, 128, true, false},  // its first queries see nothing
    {1, 4, 700000, 500000, 128, 4, 128, true, true},
    {1, 8, 1048576, 1048576, 128, 4, 64, true, true},
    {1, 8, 1040001, 1048576, 128, 4, 128, true, false},
    {1, 1, 1048576, 1048576, 128, 1, 64, true, false},
};

ScoreParams params_of(const Shape& shape, const BlockRange& rows) {
  static float mass;
  ScoreParams p{};
  p.batch = shape.batch;
  p.proxy_heads = shape.proxy_heads;
  p.q_len = shape.q_len;
  p.kv_len = shape.kv_len;
  p.head_dim = shape.head_dim;
  p.stride = shape.stride;
  p.q_block = p.kv_block = shape.block;
  p.q_offset = shape.causal ? shape.kv_len - shape.q_len : 0;
  p.causal = shape.causal;
  p.mass = shape.with_mass ? &mass : nullptr;
  p.rows = rows;
  return p;
}

int64_t num_blocks(const Shape& shape) {
  return (shape.q_len + shape.block - 1) / shape.block;
}

int64_t ceil_of(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

TEST(passes_share_out_slots_and_row_tiles) {
  for (const Shape& shape : kShapes) {
    const ScorePlan plan(params_of(shape, {0, num_blocks(shape)}));
    const int64_t rows = ceil_of(shape.q_len, shape.stride);
    CHECK_EQ(plan.max_tiles(), shape.batch * shape.proxy_heads * ceil_of(rows, plan.tile_rows()));
    int64_t slots = 0;
    int64_t tiles = 0;
    plan.for_each_pass([&](const ScorePass& pass) {
      CHECK_EQ(pass.slots_begin, slots);
      CHECK_EQ(pass.tiles_begin, tiles);
      CHECK(pass.slots_begin < pass.slots_end && pass.tiles_begin <= pass.tiles_end);
      slots = pass.slots_end;
      tiles = pass.tiles_end;
    });
    CHECK(slots >= plan.lists() * plan.slots().list_slots);
    CHECK_EQ(tiles, plan.max_tiles());
  }
}

// A row tile is of the pass that its first slot lies in, and may reach over its end.
TEST(scratch_holds_every_pass) {
  for (const Shape& shape : kShapes) {
    const ScorePlan plan(params_of(shape, {0, num_blocks(shape)}));
    const int64_t keys = ceil_of(ceil_of(shape.kv_len, shape.stride), 128);
    const int64_t longest = ceil_of(keys, int64_t{1} << plan.chunk_shift());
    const int64_t needed = plan.num_passes() == 1 ? plan.lists() * plan.slots().list_slots
                                                  : plan.pass_slots() + longest - 1;
    CHECK(needed <= plan.max_slots());
    CHECK(plan.num_passes() * int64_t{sizeof(int32_t)} <= plan.counter_bytes());
  }
}

// A long call is worked through in pieces whose scratch is that of the last piece.
TEST(of_as_many_rows_the_last_need_the_most_scratch) {
  for (const Shape& shape : kShapes) {
    const int64_t blocks = num_blocks(shape);
    for (int64_t step = blocks; step > 0; step /= 3) {
      const int64_t most = ScorePlan(params_of(shape, {blocks - step, blocks})).workspace_bytes();
      for (int64_t begin = 0; begin < blocks; begin += step) {
        const int64_t end = begin + step < blocks ? begin + step : blocks;
        CHECK(ScorePlan(params_of(shape, {begin, end})).workspace_bytes() <= most);
      }
      if (blocks / step > 300) break;
    }
  }
}

}  // namespace

int main() {
  return proxyattn::test::run_all();
}
