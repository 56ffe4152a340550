// block_sparse_attention on the CPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "proxyattn/attention.h"
#include "proxyattn/error.h"

#include "check.h"
#include "common/block_grid.h"
#include "families.h"
#include "reference.h"
#include "tensors.h"

namespace proxyattn {
namespace {

using test::Tensor;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kScale = 0.25f;

struct Inputs {
  Tensor q;
  Tensor k;
  Tensor v;
  int64_t block;
  bool causal;

  BlockGrid grid() const { return {q.tokens, k.tokens, block, block, k.tokens - q.tokens, causal}; }
};

Inputs random_inputs(DType dtype,
                     int64_t batch,
                     int64_t q_len,
                     int64_t kv_len,
                     int64_t q_heads,
                     int64_t kv_heads,
                     int64_t head_dim,
                     int64_t block,
                     bool causal) {
  return {Tensor(dtype, batch, q_len, q_heads, head_dim, 8).fill_normal(1),
          Tensor(dtype, batch, kv_len, kv_heads, head_dim, 40).fill_normal(2),
          Tensor(dtype, batch, kv_len, kv_heads, head_dim).fill_normal(3), block, causal};
}

// No heads: every visible block.
struct Lists {
  int64_t heads = 0;
  int64_t capacity = 0;
  std::vector<int32_t> indices;
  std::vector<int32_t> counts;
};

// Shuffled lists of any key blocks, visible or not, and counts of every size.
Lists random_lists(const Inputs& in, int64_t heads, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t num_blocks = in.grid().num_kv_blocks();
  const int64_t num_rows = in.grid().num_q_blocks();
  Lists lists{heads, num_blocks + 2, {}, {}};
  for (int64_t i = 0; i < in.q.batch * heads * num_rows; ++i) {
    std::vector<int32_t> order(static_cast<std::size_t>(num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    lists.indices.insert(lists.indices.end(), order.begin(), order.end());
    lists.indices.insert(lists.indices.end(), 2, -1000000000);  // never to be read
  }
  for (int64_t i = 0; i < in.q.batch * in.q.heads * num_rows; ++i) {
    lists.counts.push_back(static_cast<int32_t>(random() % static_cast<unsigned>(num_blocks + 1)));
  }
  return lists;
}

struct Outputs {
  Tensor out;
  std::vector<float> lse;
};

void attend(const Inputs& in, const Lists& lists, const BlockRange& rows, Outputs& outputs) {
  AttentionParams p{};
  p.batch = in.q.batch;
  p.q_len = in.q.tokens;
  p.kv_len = in.k.tokens;
  p.q_heads = in.q.heads;
  p.kv_heads = in.k.heads;
  p.head_dim = in.q.head_dim;
  p.list_heads = max_of<int64_t>(1, lists.heads);
  p.list_capacity = lists.capacity;
  p.q_block = in.block;
  p.kv_block = in.block;
  p.q_offset = in.k.tokens - in.q.tokens;
  p.rows = p.list_rows = rows;
  p.lse_pitch = p.q_len;
  p.q_strides = in.q.strides;
  p.k_strides = in.k.strides;
  p.v_strides = in.v.strides;
  p.out_strides = outputs.out.strides;
  p.q = in.q.data();
  p.k = in.k.data();
  p.v = in.v.data();
  p.indices = lists.heads == 0 ? nullptr : lists.indices.data();
  p.counts = lists.heads == 0 ? nullptr : lists.counts.data();
  p.out = outputs.out.data();
  p.lse = outputs.lse.data();
  p.scale = kScale;
  p.causal = in.causal;
  p.dtype = in.q.dtype;
  const test::Workspace workspace(p, cpu::block_sparse_attention_workspace_bytes(p));
  cpu::block_sparse_attention(p);
}

Outputs empty_outputs(const Inputs& in) {
  return {
      Tensor(in.q.dtype, in.q.batch, in.q.tokens, in.q.heads, in.q.head_dim, 16),
      std::vector<float>(static_cast<std::size_t>(in.q.batch * in.q.tokens * in.q.heads), kNan)};
}

Outputs attend(const Inputs& in, const Lists& lists) {
  Outputs outputs = empty_outputs(in);
  attend(in, lists, {0, in.grid().num_q_blocks()}, outputs);
  return outputs;
}

bool same(const Outputs& a, const Outputs& b) {
  return a.out.same_bits(b.out) && a.lse == b.lse;
}

// Keys that query i of a head reads: those of the chosen blocks that lie at or before it.
std::vector<int64_t> keys_of(
    const Inputs& in, const Lists& lists, int64_t batch, int64_t head, int64_t i) {
  const BlockGrid grid = in.grid();
  const int64_t m = i / in.block;
  std::vector<int64_t> blocks(static_cast<std::size_t>(grid.num_kv_blocks()));
  std::iota(blocks.begin(), blocks.end(), 0);
  if (lists.heads > 0) {
    const int64_t list = batch * lists.heads + head / (in.q.heads / lists.heads);
    const auto first = lists.indices.begin() + (list * grid.num_q_blocks() + m) * lists.capacity;
    const int32_t count = lists.counts[static_cast<std::size_t>(
        (batch * in.q.heads + head) * grid.num_q_blocks() + m)];
    blocks.assign(first, first + count);
  }
  std::vector<int64_t> keys;
  for (const int64_t n : blocks) {
    for (int64_t j = n * in.block; j < min_of((n + 1) * in.block, in.k.tokens); ++j) {
      if (!in.causal || j <= grid.q_offset + i) keys.push_back(j);
    }
  }
  return keys;
}

void check_query(const Inputs& in,
                 const Lists& lists,
                 const Outputs& got,
                 int64_t batch,
                 int64_t head,
                 int64_t i) {
  const int64_t kv_head = head / (in.q.heads / in.k.heads);
  const std::vector<int64_t> keys = keys_of(in, lists, batch, head, i);
  std::vector<double> scores;
  for (const int64_t j : keys) {
    scores.push_back(static_cast<double>(kScale) *
                     test::dot(in.q, {batch, i, head}, in.k, {batch, j, kv_head}));
  }
  const double lse = test::log_sum_exp(scores);
  CHECK_NEAR(got.lse[static_cast<std::size_t>((batch * in.q.heads + head) * in.q.tokens + i)], lse,
             1e-5);
  for (int64_t d = 0; d < in.q.head_dim; ++d) {
    double expected = 0.0;
    for (std::size_t x = 0; x < keys.size(); ++x) {
      expected += std::exp(scores[x] - lse) * in.v.at(batch, keys[x], kv_head, d);
    }
    CHECK_NEAR(got.out.at(batch, i, head, d), expected,
               1e-5 + std::fabs(expected) * test::rounding_unit(in.q.dtype));
  }
}

void check_outputs(const Inputs& in, const Lists& lists) {
  const Outputs got = attend(in, lists);
  for (int64_t b = 0; b < in.q.batch; ++b) {
    for (int64_t h = 0; h < in.q.heads; ++h) {
      for (int64_t i = 0; i < in.q.tokens; ++i) check_query(in, lists, got, b, h, i);
    }
  }
}

TEST(random_lists_of_every_sharing) {
  test::for_each_family([] {
    for (const DType dtype : test::kAllDTypes) {
      const Inputs in = random_inputs(dtype, 2, 150, 300, 6, 3, 64, 64, true);
      for (const int64_t list_heads : {1, 2, 3, 6}) {
        check_outputs(in, random_lists(in, list_heads, 1));
      }
    }
    for (const int64_t block : kBlockSizes) {
      for (const int64_t head_dim : kHeadDims) {
        const Inputs in = random_inputs(DType::kFloat32, 1, 130, 193, 2, 1, head_dim, block, false);
        check_outputs(in, random_lists(in, 1, 2));
      }
    }
    const Inputs many_heads = random_inputs(DType::kFloat32, 1, 65, 129, 10, 1, 64, 64, true);
    check_outputs(many_heads, random_lists(many_heads, 1, 3));
  });
}

TEST(no_lists_mean_all_visible_blocks) {
  test::for_each_family([] {
    for (const bool causal : {false, true}) {
      for (const int64_t length : {1, 63, 64, 65, 200}) {
        check_outputs(random_inputs(DType::kFloat32, 1, length, length, 2, 1, 64, 64, causal), {});
        check_outputs(random_inputs(DType::kFloat32, 1, length, 211, 2, 2, 128, 64, causal), {});
      }
    }
    check_outputs(random_inputs(DType::kFloat32, 1, 211, 3, 2, 1, 64, 128, false), {});
  });
}

TEST(two_keys_by_hand) {
  // The query scores key 0 with ln 3 and key 1 with 0: weights 3/4 and 1/4.
  Inputs in{Tensor(DType::kFloat32, 1, 1, 1, 64), Tensor(DType::kFloat32, 1, 2, 1, 64),
            Tensor(DType::kFloat32, 1, 2, 1, 64), 64, true};
  for (int64_t d = 0; d < 64; ++d) {
    in.q.set(0, 0, 0, d, d == 0 ? 1.0f : 0.0f);
    in.k.set(0, 0, 0, d, d == 0 ? 1.0986123f / kScale : 0.0f);
    in.k.set(0, 1, 0, d, 0.0f);
    in.v.set(0, 0, 0, d, 4.0f);
    in.v.set(0, 1, 0, d, static_cast<float>(-4 * d));
  }
  const Outputs got = attend(in, {});
  CHECK_NEAR(got.out.at(0, 0, 0, 0), 3.0, 1e-6);
  CHECK_NEAR(got.out.at(0, 0, 0, 7), -4.0, 1e-6);
  CHECK_NEAR(got.lse[0], std::log(4.0), 1e-6);
}

TEST(rows_with_nothing_to_see) {
  test::for_each_family([] {
    const Inputs in = random_inputs(DType::kFloat32, 1, 128, 128, 2, 1, 64, 64, true);
    // Row 0 of head 0 reads nothing; row 0 of head 1 reads block 1, which lies behind it.
    const Lists lists{1, 2, {1, 0, 0, 1}, {0, 2, 1, 2}};
    check_outputs(in, lists);
    const Outputs got = attend(in, lists);
    CHECK_EQ(got.lse[0], -INFINITY);
    CHECK_EQ(got.out.at(0, 5, 0, 3), 0.0);
    CHECK_EQ(got.lse[128], -INFINITY);
    CHECK_EQ(got.out.at(0, 63, 1, 63), 0.0);
    const Inputs no_keys = random_inputs(DType::kFloat32, 1, 70, 0, 2, 1, 64, 64, false);
    const Outputs nothing = attend(no_keys, {});
    CHECK_EQ(nothing.out.at(0, 69, 1, 63), 0.0);
    CHECK_EQ(nothing.lse[139], -INFINITY);
  });
}

TEST(nan_stays_in_the_blocks_that_hold_it) {
  test::for_each_family([] {
    Inputs in = random_inputs(DType::kFloat32, 1, 256, 256, 2, 1, 64, 64, true);
    Lists lists{1, 4, {}, {}};
    for (int32_t m = 0; m < 4; ++m) {
      for (int32_t i = 0; i < 4; ++i) lists.indices.push_back(i == 0 ? m : i - 1);
    }
    // Head 0 reads its own block only, head 1 block 0 too.
    lists.counts = {1, 1, 1, 1, 1, 2, 2, 2};
    const Outputs clean = attend(in, lists);
    in.k.set(0, 3, 0, 7, kNan);
    in.v.set(0, 9, 0, 5, std::numeric_limits<float>::infinity());
    const Outputs got = attend(in, lists);
    for (int64_t i = 64; i < 256; ++i) {
      CHECK_EQ(got.out.at(0, i, 0, 5), clean.out.at(0, i, 0, 5));
      CHECK_EQ(got.lse[static_cast<std::size_t>(i)], clean.lse[static_cast<std::size_t>(i)]);
      CHECK(std::isnan(got.out.at(0, i, 1, 5)));
      CHECK(std::isnan(got.lse[static_cast<std::size_t>(256 + i)]));
    }
  });
}

TEST(large_scores_do_not_overflow) {
  test::for_each_family([] {
    Inputs in = random_inputs(DType::kFloat32, 1, 100, 100, 1, 1, 64, 64, true);
    in.q.fill_normal(5, 1e4f);
    in.k.fill_normal(6, 1e4f);
    const Outputs got = attend(in, {});
    for (int64_t i = 0; i < 100; ++i) {
      // One key holds all the weight, so that the output is its value.
      std::vector<double> scores;
      for (int64_t j = 0; j <= i; ++j)
        scores.push_back(test::dot(in.q, {0, i, 0}, in.k, {0, j, 0}));
      const auto best = std::max_element(scores.begin(), scores.end()) - scores.begin();
      CHECK_EQ(got.out.at(0, i, 0, 9), in.v.at(0, best, 0, 9));
    }
  });
}

TEST(threads_ranges_of_rows_and_grouping_of_heads_change_nothing) {
  test::for_each_family([] {
    const Inputs in = random_inputs(DType::kBFloat16, 1, 500, 700, 8, 2, 128, 64, true);
    const Lists lists = random_lists(in, 2, 4);
    const Outputs whole = attend(in, lists);
    test::for_some_thread_counts([&] { CHECK(same(attend(in, lists), whole)); });

    const int64_t num_rows = in.grid().num_q_blocks();
    Outputs pieces = empty_outputs(in);
    for (int64_t m = 0; m < num_rows; ++m) {
      Lists part{2, lists.capacity, {}, {}};
      for (int64_t list = 0; list < 2; ++list) {
        const auto first = lists.indices.begin() + (list * num_rows + m) * lists.capacity;
        part.indices.insert(part.indices.end(), first, first + lists.capacity);
      }
      for (std::size_t head = 0; head < 8; ++head) {
        part.counts.push_back(
            lists.counts[head * static_cast<std::size_t>(num_rows) + static_cast<std::size_t>(m)]);
      }
      attend(in, part, {m, m + 1}, pieces);
    }
    CHECK(same(pieces, whole));

    // The same lists spelled out for each head, which keeps heads apart.
    Lists spelled_out{8, lists.capacity, {}, lists.counts};
    for (int64_t head = 0; head < 8; ++head) {
      const auto first = lists.indices.begin() + head / 4 * num_rows * lists.capacity;
      spelled_out.indices.insert(spelled_out.indices.end(), first,
                                 first + num_rows * lists.capacity);
    }
    CHECK(same(attend(in, spelled_out), whole));
  });
}

TEST(empty_inputs) {
  CHECK(attend(random_inputs(DType::kFloat32, 0, 64, 64, 2, 1, 64, 64, true), {}).lse.empty());
  CHECK(attend(random_inputs(DType::kFloat32, 1, 0, 64, 2, 1, 64, 64, true), {}).lse.empty());
}

TEST(rules) {
  const Inputs in = random_inputs(DType::kFloat32, 1, 64, 128, 2, 1, 64, 64, true);
  const auto with = [&](int32_t index, int32_t count) {
    attend(in, Lists{1, 3, {0, index, 1}, {0, count}});
  };
  with(2, 1);  // past the count
  CHECK_THROWS(InvalidArgument,
               "block_sparse_attention: indices must name key blocks in [0, 2), got 2", with(2, 2));
  CHECK_THROWS(InvalidArgument,
               "block_sparse_attention: indices must name key blocks in [0, 2), got -1",
               with(-1, 3));
  CHECK_THROWS(InvalidArgument,
               "block_sparse_attention: counts must be in [0, 3], the lists' capacity, got 4",
               with(1, 4));
  CHECK_THROWS(InvalidArgument,
               "block_sparse_attention: counts must be in [0, 3], the lists' capacity, got -1",
               with(1, -1));
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
