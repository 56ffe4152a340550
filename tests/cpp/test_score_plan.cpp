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

TEST(passes_cover_every_row_of_every_list_once) {
  for (const Shape& shape : kShapes) {
    const ScorePlan plan(params_of(shape, {0, num_blocks(shape)}));
    const int64_t lists = shape.batch * shape.proxy_heads;
    const int64_t row_tiles = (plan.num_rows() + plan.tile_rows() - 1) / plan.tile_rows();
    std::vector<int64_t> next(static_cast<size_t>(lists), row_tiles);  // not covered before
    plan.for_each_pass([&](const ScorePass& pass) {
      CHECK(pass.begin < pass.end && pass.num_lists > 0);
      for (int64_t list = 0; list < pass.num_lists; ++list) {
        int64_t& end = next[static_cast<size_t>(pass.first_list + list)];
        CHECK_EQ(end, pass.end);
        end = pass.begin;
      }
    });
    for (const int64_t rest : next) CHECK_EQ(rest, 0);
  }
}

TEST(scratch_holds_every_pass) {
  for (const Shape& shape : kShapes) {
    const ScorePlan plan(params_of(shape, {0, num_blocks(shape)}));
    int64_t passes = 0;
    plan.for_each_pass([&](const ScorePass& pass) {
      ++passes;
      CHECK(pass.num_lists * pass.list_slots << plan.chunk_shift() <= plan.max_places());
    });
    CHECK(passes * int64_t{sizeof(int32_t)} <= plan.counter_bytes());
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
