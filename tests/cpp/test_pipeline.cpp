// proxy_attention and choose_blocks on the CPU: chains of the stages, in one piece and in several.
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "proxyattn/error.h"
#include "proxyattn/pipeline.h"

#include "chain.h"
#include "check.h"
#include "common/block_grid.h"
#include "families.h"
#include "tensors.h"

namespace proxyattn {
namespace {

using test::attend;
using test::attend_to;
using test::choose;
using test::choose_by_stages;
using test::Lists;
using test::Outputs;
using test::Tensor;

constexpr int64_t kNoCap = std::numeric_limits<int64_t>::max();
constexpr BudgetMode kModes[] = {BudgetMode::kLastBlock, BudgetMode::kTopP};
constexpr Pooling kPoolings[] = {Pooling::kMean, Pooling::kFirst};

struct Inputs {
  Tensor q;
  Tensor k;
  Tensor v;
};

Inputs random_inputs(DType dtype, int64_t q_len, int64_t kv_len) {
  return {Tensor(dtype, 2, q_len, 4, 64, 8).fill_normal(1),
          Tensor(dtype, 2, kv_len, 2, 64).fill_normal(2),
          Tensor(dtype, 2, kv_len, 2, 64, 16).fill_normal(3)};
}

PipelineParams params_of(const Inputs& in, BudgetMode mode, double gamma) {
  PipelineParams p{};
  p.batch = in.q.batch;
  p.q_len = in.q.tokens;
  p.kv_len = in.k.tokens;
  p.q_heads = in.q.heads;
  p.kv_heads = in.k.heads;
  p.proxy_heads = 2;
  p.head_dim = in.q.head_dim;
  p.stride = 4;
  p.q_block = 64;
  p.kv_block = 64;
  p.q_offset = in.k.tokens - in.q.tokens;
  p.num_sink_blocks = 1;
  p.num_local_blocks = 1;
  p.q_strides = in.q.strides;
  p.k_strides = in.k.strides;
  p.v_strides = in.v.strides;
  p.q = in.q.data();
  p.k = in.k.data();
  p.v = in.v.data();
  p.max_workspace_bytes = kNoCap;
  p.gamma = gamma;
  p.scale = 0.25f;
  p.pooling = Pooling::kMean;
  p.budget_mode = mode;
  p.causal = true;
  p.dtype = in.q.dtype;
  return p;
}

TEST(both_ops_are_chains_of_the_stages) {
  test::for_each_family([] {
    for (const DType dtype : test::kAllDTypes) {
      const Inputs in = random_inputs(dtype, 700, 901);
      for (const BudgetMode mode : kModes) {
        for (const int64_t proxy_heads : {1, 2, 4}) {
          for (const Pooling pooling : kPoolings) {
            PipelineParams p = params_of(in, mode, 0.6);
            p.proxy_heads = proxy_heads;
            p.pooling = pooling;
            const Lists lists = choose_by_stages(p);
            CHECK(choose(p) == lists);
            CHECK(same(attend(p), attend_to(p, lists)));
          }
        }
      }
    }
  });
}

TEST(pooling_makes_a_difference) {
  const Inputs in = random_inputs(DType::kFloat32, 700, 901);
  PipelineParams p = params_of(in, BudgetMode::kTopP, 0.6);
  const Lists mean = choose(p);
  p.pooling = Pooling::kFirst;
  CHECK(!(choose(p) == mean));
}

TEST(shares_can_be_given) {
  const Inputs in = random_inputs(DType::kFloat32, 700, 901);
  PipelineParams p = params_of(in, BudgetMode::kTopP, 0.6);
  const Lists lists = choose(p);
  const test::Needs needs = test::estimate(p);
  p.shares = needs.shares.data();
  CHECK(choose(p) == lists);
  CHECK(same(attend(p), attend_to(p, lists)));
  const std::vector<float> zeros(needs.shares.size());
  p.shares = zeros.data();
  CHECK(!(choose(p) == lists));
  CHECK(choose(p) == choose_by_stages(p));
  CHECK(same(attend(p), attend_to(p, choose(p))));
}

// Lists of query blocks `rows`, as a call over those queries and the keys up to them gives them.
Lists choose_chunk(const Inputs& in, PipelineParams p, const BlockRange& rows) {
  const int64_t first = rows.begin * p.q_block;
  p.q = static_cast<const float*>(in.q.data()) + first * in.q.strides.token;
  p.q_len = min_of(rows.end * p.q_block, p.q_len) - first;
  p.q_offset += first;
  p.kv_len = p.q_offset + p.q_len;
  return choose(p);
}

TEST(chunks_read_what_the_whole_prompt_reads) {
  const Inputs in = random_inputs(DType::kFloat32, 700, 700);
  const std::vector<float> shares = {0.1f, 0.5f, 0.0f, 0.3f, 0.2f, 0.7f, 0.9f, 0.4f};
  PipelineParams p = params_of(in, BudgetMode::kTopP, 0.6);
  p.shares = shares.data();
  const Lists whole = choose(p);
  const std::size_t num_rows = 11;  // and as many key blocks
  for (const std::size_t step : {1u, 2u, 5u}) {
    for (std::size_t begin = 0; begin < num_rows; begin += step) {
      const std::size_t size = min_of(step, num_rows - begin), num_blocks = begin + size;
      const Lists chunk =
          choose_chunk(in, p, {static_cast<int64_t>(begin), static_cast<int64_t>(num_blocks)});
      for (std::size_t row = 0; row < 4 * size; ++row) {
        const std::size_t whole_row = row / size * num_rows + begin + row % size;
        for (std::size_t i = 0; i < num_blocks; ++i) {
          CHECK_EQ(chunk.indices[row * num_blocks + i], whole.indices[whole_row * num_rows + i]);
        }
      }
      for (std::size_t row = 0; row < 8 * size; ++row) {
        CHECK_EQ(chunk.counts[row], whole.counts[row / size * num_rows + begin + row % size]);
      }
    }
  }
}

TEST(threads_change_nothing) {
  const Inputs in = random_inputs(DType::kFloat32, 700, 901);
  const PipelineParams p = params_of(in, BudgetMode::kTopP, 0.6);
  const Outputs whole = attend(p);
  const Lists lists = choose(p);
  test::for_some_thread_counts([&] {
    CHECK(same(attend(p), whole));
    CHECK(choose(p) == lists);
  });
}

// Calls check() under ever lower caps until the op says that it cannot do with less. Returns how
// many caps it could do with.
template <typename Bytes, typename Check>
int64_t for_lower_caps(PipelineParams p, const std::string& op, Bytes bytes, Check check) {
  for (int64_t num_caps = 0;; ++num_caps) {
    p.max_workspace_bytes = bytes(p) - 1;
    try {
      check(p);
      CHECK(bytes(p) <= p.max_workspace_bytes);
    } catch (const InvalidArgument& error) {
      const std::string text = error.what();
      CHECK(text.find(op + ": max_workspace_bytes must be at least ") == 0);
      return num_caps;
    }
  }
}

TEST(less_workspace_gives_the_same_bits) {
  const Inputs in = random_inputs(DType::kFloat32, 1400, 1500);
  for (const BudgetMode mode : kModes) {
    for (const int64_t proxy_heads : {2, 4}) {
      PipelineParams p = params_of(in, mode, 0.6);
      p.proxy_heads = proxy_heads;
      const Outputs whole = attend(p);
      const Lists lists = choose(p);
      CHECK(for_lower_caps(p, "proxy_attention", cpu::proxy_attention_workspace_bytes,
                           [&](const auto& capped) { CHECK(same(attend(capped), whole)); }) >= 2);
      CHECK(for_lower_caps(p, "choose_blocks", cpu::choose_blocks_workspace_bytes,
                           [&](const auto& capped) { CHECK(choose(capped) == lists); }) >= 2);
    }
  }
}

TEST(gamma_of_one_and_large_minimums_are_dense_attention) {
  const Inputs in = random_inputs(DType::kFloat32, 300, 300);
  for (const BudgetMode mode : kModes) {
    PipelineParams p = params_of(in, mode, 1.0);
    const Outputs dense = attend(p);
    const Lists all = choose(p);
    CHECK(all == choose_by_stages(p));  // rankings, though every block is read
    for (std::size_t i = 0; i < all.counts.size(); ++i) {
      CHECK_EQ(all.counts[i], static_cast<int32_t>(i % 5 + 1));
    }
    p.gamma = 0.5;
    CHECK(!same(attend(p), dense));
    for (const int64_t min_budget : {int64_t{300}, kNoCap}) {
      p.min_budget = min_budget;
      CHECK(same(attend(p), dense));
      CHECK(choose(p) == all);
    }
  }
}

void check_counts(const Lists& lists, const BlockGrid& grid, bool all) {
  for (std::size_t i = 0; i < lists.counts.size(); ++i) {
    const int64_t visible = grid.visible(static_cast<int64_t>(i) % grid.num_q_blocks());
    CHECK(lists.counts[i] >= (all ? visible : 1) && lists.counts[i] <= visible);
  }
}

TEST(numbers_may_be_as_large_as_they_go) {
  const Inputs in = random_inputs(DType::kFloat32, 300, 333);
  const BlockGrid grid{300, 333, 64, 64, 33, true};
  const double inf = std::numeric_limits<double>::infinity();
  for (const BudgetMode mode : kModes) {
    for (const double gamma : {-inf, -5.0, 0.5, inf}) {
      for (int bits = 0; bits < 8; ++bits) {
        PipelineParams p = params_of(in, mode, gamma);
        p.min_budget = (bits & 1) != 0 ? kNoCap : 0;
        p.num_sink_blocks = (bits & 2) != 0 ? kNoCap : 0;
        p.num_local_blocks = (bits & 4) != 0 ? kNoCap : 0;
        const Lists lists = choose(p);
        CHECK(lists == choose_by_stages(p));
        check_counts(lists, grid, gamma >= 1.0 || bits != 0);
        if (gamma < 0.0 && bits == 0) CHECK(lists.counts == std::vector<int32_t>(40, 1));
        const Outputs expected = attend_to(p, lists);
        // Dense attention goes block by block of another size.
        const Outputs got = attend(p);
        for (std::size_t i = 0; i < got.lse.size(); ++i) {
          CHECK_NEAR(got.lse[i], static_cast<double>(expected.lse[i]), 1e-4);
        }
      }
    }
  }
}

TEST(empty_inputs) {
  for (const double gamma : {0.5, 1.0}) {
    const Inputs no_queries = random_inputs(DType::kFloat32, 0, 100);
    const PipelineParams none = params_of(no_queries, BudgetMode::kTopP, gamma);
    CHECK(attend(none).lse.empty());
    CHECK(choose(none).counts.empty());
    const Inputs no_keys = random_inputs(DType::kFloat32, 100, 0);
    PipelineParams p = params_of(no_keys, BudgetMode::kTopP, gamma);
    p.causal = false;
    const Outputs nothing = attend(p);
    CHECK_EQ(nothing.out.at(1, 99, 3, 63), 0.0);
    CHECK_EQ(nothing.lse.back(), -std::numeric_limits<float>::infinity());
    CHECK(choose(p).counts == std::vector<int32_t>(16, 0));
  }
}

TEST(rules) {
  const Inputs in = random_inputs(DType::kFloat32, 64, 64);
  PipelineParams p = params_of(in, BudgetMode::kLastBlock, 0.5);
  const std::vector<float> shares(8);
  p.shares = shares.data();
  CHECK_THROWS(InvalidArgument,
               "choose_blocks: shares must be None with budget_mode=\"last_block\", got a tensor",
               choose(p));
  p.shares = nullptr;
  p.proxy_heads = 3;
  CHECK_THROWS(InvalidArgument,
               "proxy_attention: num_proxy_heads must divide kv_heads or be a multiple of it that "
               "divides q_heads, got num_proxy_heads=3, kv_heads=2, q_heads=4",
               attend(p));
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
