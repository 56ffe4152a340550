// Packed sequences as a GPU works through them, all together and in parts of their query blocks:
// what the CPU gives for one sequence after another.
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "proxyattn/error.h"
#include "proxyattn/pipeline.h"

#include "check.h"
#include "common/pipeline.h"
#include "cuda/needs/layout.h"
#include "packed_stages.h"
#include "sequences.h"
#include "tensors.h"

namespace proxyattn {
namespace {

using test::Lengths;
using test::PackedStages;
using test::Tensor;
using Attend = Pipeline<PackedStages, PipelineJob::kAttend>;
using Choose = Pipeline<PackedStages, PipelineJob::kChoose>;

constexpr int64_t kNoCap = std::numeric_limits<int64_t>::max();
constexpr BudgetMode kModes[] = {BudgetMode::kTopP, BudgetMode::kLastBlock};

// Starts that rise by the lengths.
std::vector<int32_t> starts_of(const std::vector<Lengths>& lengths, int32_t Lengths::* length) {
  std::vector<int32_t> starts = {0};
  for (const Lengths& one : lengths) starts.push_back(starts.back() + one.*length);
  return starts;
}

// Some tokens more than are used, which are NaN, and capacities that are larger yet.
class Call {
 public:
  explicit Call(const std::vector<Lengths>& lengths)
      : q_starts_(starts_of(lengths, &Lengths::q)),
        kv_starts_(starts_of(lengths, &Lengths::kv)),
        q_(DType::kFloat32, 1, q_starts_.back() + 70, 4, 64),
        k_(DType::kFloat32, 1, kv_starts_.back() + 70, 2, 64),
        v_(DType::kFloat32, 1, kv_starts_.back() + 70, 2, 64) {
    q_.fill_normal(1);
    k_.fill_normal(2);
    v_.fill_normal(3);
  }

  PipelineParams params(BudgetMode mode) const {
    PipelineParams p{};
    p.batch = static_cast<int64_t>(q_starts_.size()) - 1;
    p.q_len = 900;
    p.kv_len = 1300;
    p.q_heads = 4;
    p.kv_heads = 2;
    p.proxy_heads = 2;
    p.head_dim = 64;
    p.stride = 4;
    p.q_block = p.kv_block = 64;
    p.num_sink_blocks = p.num_local_blocks = 1;
    p.q_strides = p.out_strides = q_.strides;
    p.k_strides = p.v_strides = k_.strides;
    p.q = q_.data();
    p.k = k_.data();
    p.v = v_.data();
    p.max_workspace_bytes = kNoCap;
    p.gamma = 0.6;
    p.scale = 0.25f;
    p.pooling = Pooling::kMean;
    p.budget_mode = mode;
    p.causal = true;
    p.dtype = DType::kFloat32;
    p.packed.q_starts = q_starts_.data();
    p.packed.kv_starts = kv_starts_.data();
    p.packed.total_q = q_.tokens;
    p.packed.total_kv = k_.tokens;
    return p;
  }

 private:
  std::vector<int32_t> q_starts_, kv_starts_;
  Tensor q_, k_, v_;
};

struct Outputs {
  Tensor out;
  std::vector<float> lse;
};

bool same(const Outputs& a, const Outputs& b) {
  return a.out.same_bits(b.out) && a.lse == b.lse;
}

// Calls attend(params) with a workspace of bytes(params).
template <typename Bytes, typename Run>
Outputs attend(PipelineParams p, const Bytes& bytes, const Run& run) {
  Outputs outputs{
      Tensor(p.dtype, 1, p.packed.total_q, p.q_heads, p.head_dim),
      std::vector<float>(static_cast<std::size_t>(p.packed.total_q * p.q_heads), -7.0f)};
  p.out = outputs.out.data();
  p.lse = outputs.lse.data();
  p.lse_pitch = p.packed.total_q;
  const test::Workspace workspace(p, bytes(p));
  run(p);
  return outputs;
}
Outputs attend_on_cpu(const PipelineParams& p) {
  return attend(p, cpu::proxy_attention_workspace_bytes, cpu::proxy_attention);
}
Outputs attend_in_parts(const PipelineParams& p) {
  return attend(
      p, [](const auto& params) { return Attend(params).workspace_bytes(); },
      [](const auto& params) { Attend(params).run(); });
}

struct Lists {
  std::vector<int32_t> indices, counts;

  bool operator==(const Lists& other) const {
    return indices == other.indices && counts == other.counts;
  }
};

template <typename Bytes, typename Run>
Lists choose(PipelineParams p, const Bytes& bytes, const Run& run) {
  const CallSizes sizes(p);
  p.list_rows = {0, sizes.q_blocks()};
  p.list_capacity = sizes.kv_blocks() + 3;
  const int64_t entries = p.proxy_heads * p.list_rows.end * p.list_capacity;
  Lists lists{std::vector<int32_t>(static_cast<std::size_t>(entries), -9),
              std::vector<int32_t>(static_cast<std::size_t>(sizes.counts()), -9)};
  p.indices = lists.indices.data();
  p.counts = lists.counts.data();
  const test::Workspace workspace(p, bytes(p));
  run(p);
  return lists;
}
Lists choose_on_cpu(const PipelineParams& p) {
  return choose(p, cpu::choose_blocks_workspace_bytes, cpu::choose_blocks);
}
Lists choose_in_parts(const PipelineParams& p) {
  return choose(
      p, [](const auto& params) { return Choose(params).workspace_bytes(); },
      [](const auto& params) { Choose(params).run(); });
}

// Under ever lower caps, until the op says that it can't do with less. Returns how many there were.
template <typename Job, typename Check>
int64_t for_lower_caps(PipelineParams p, const std::string& op, const Check& check) {
  for (int64_t num_caps = 1;; ++num_caps) {
    check(p);
    p.max_workspace_bytes = Job(p).workspace_bytes() - 1;
    try {
      Job{p};
    } catch (const InvalidArgument& error) {
      const std::string text = error.what();
      CHECK(text.find(op + ": max_workspace_bytes must be at least ") == 0);
      return num_caps;
    }
  }
}

void check_parts(const PipelineParams& p, int64_t least_caps) {
  const Outputs outputs = attend_on_cpu(p);
  const Lists lists = choose_on_cpu(p);
  CHECK(for_lower_caps<Attend>(p, "proxy_attention_varlen", [&](const auto& capped) {
          CHECK(same(attend_in_parts(capped), outputs));
        }) >= least_caps);
  CHECK(for_lower_caps<Choose>(p, "choose_blocks_varlen", [&](const auto& capped) {
          CHECK(choose_in_parts(capped) == lists);
        }) >= least_caps);
}

TEST(parts_give_what_each_sequence_gives) {
  for (const std::vector<Lengths>& lengths :
       {std::vector<Lengths>{{500, 700}, {0, 0}, {1, 1}, {130, 1200}, {0, 50}, {64, 64}},
        std::vector<Lengths>{{300, 100}, {65, 0}, {700, 700}}, std::vector<Lengths>{{129, 900}}}) {
    const Call call(lengths);
    for (const BudgetMode mode : kModes) check_parts(call.params(mode), 3);
  }
}

TEST(parts_of_unlike_settings) {
  const Call call({{200, 700}, {65, 130}, {300, 300}});
  for (const BudgetMode mode : kModes) {
    PipelineParams p = call.params(mode);
    p.q_block = p.kv_block = 128;
    p.stride = 8;
    p.proxy_heads = 4;
    p.pooling = Pooling::kFirst;
    p.causal = false;
    check_parts(p, 2);
    p.min_budget = 256;
    check_parts(p, 2);
  }
}

TEST(shares_can_be_given) {
  const Call call({{200, 700}, {65, 130}, {300, 300}});
  const std::vector<float> shares = {.1f, .5f, 0.f, .3f, .2f, .7f, .9f, .4f, .6f, .8f, 1.f, .05f};
  PipelineParams p = call.params(BudgetMode::kTopP);
  const Outputs estimated = attend_in_parts(p);
  p.shares = shares.data();
  CHECK(!same(attend_in_parts(p), estimated));
  check_parts(p, 3);
}

TEST(settings_that_choose_every_block_run_dense) {
  const Call call({{200, 700}, {0, 9}, {65, 130}, {300, 200}});
  for (const BudgetMode mode : kModes) {
    PipelineParams p = call.params(mode);
    p.gamma = 1.0;
    CHECK(same(attend_in_parts(p), attend_on_cpu(p)));
    CHECK(choose_in_parts(p) == choose_on_cpu(p));
    p.gamma = 0.5;
    p.min_budget = kNoCap;
    CHECK(same(attend_in_parts(p), attend_on_cpu(p)));
  }
}

TEST(no_sequences) {
  const Call call({});
  const PipelineParams p = call.params(BudgetMode::kTopP);
  const Outputs nothing = attend_in_parts(p);
  CHECK(nothing.lse == std::vector<float>(4 * 70, -7.0f));
}

TEST(a_part_is_a_call_of_its_own) {
  PipelineParams p{};
  p.batch = 2;
  p.q_len = 300;
  p.kv_len = 500;
  p.q_block = p.kv_block = 64;
  p.stride = 4;
  p.q_offset = 200;
  p.q_strides = p.out_strides = {1000, 10, 1};
  p.list_rows = {0, 5};
  std::vector<float> tensor(3000);
  p.q = p.out = tensor.data();
  p.dtype = DType::kFloat32;
  const PipelineParams part = part_of(p, {3, 5});
  CHECK_EQ(part.q_len, int64_t{108});
  CHECK_EQ(part.q_offset, int64_t{392});
  CHECK_EQ(static_cast<const float*>(part.q) - tensor.data(), 1920);
  CHECK_EQ(static_cast<const float*>(part.out) - tensor.data(), 1920);
  CHECK(part.lse == nullptr);
  CHECK_EQ(part.list_rows.begin, int64_t{-3});
  CHECK_EQ(part.list_rows.end, int64_t{2});
  CHECK_EQ(CallSizes(part).q_blocks(), int64_t{2});
  CHECK_EQ(CallSizes(part).q_windows(), int64_t{27});
}

// q_start, q_len, offset, first_q_block
void check_cut(const Sequence& s, const std::vector<int32_t>& expected) {
  CHECK((std::vector<int32_t>{s.q_start, s.q_len, s.offset, s.first_q_block} == expected));
}

TEST(what_a_range_of_query_blocks_has_of_a_sequence) {
  Sequence s{};  // query blocks 3 to 6, the last one of 8 queries
  s.q_start = 1000;
  s.q_len = 200;
  s.kv_len = 150;
  s.offset = -50;
  s.first_q_block = 3;
  check_cut(cut_to_blocks(s, 0, 7, 64), {1000, 200, -50, 3});
  check_cut(cut_to_blocks(s, 3, 7, 64), {1000, 200, -50, 0});
  check_cut(cut_to_blocks(s, 2, 5, 64), {1000, 128, -50, 1});
  check_cut(cut_to_blocks(s, 4, 6, 64), {1064, 128, 14, 0});
  check_cut(cut_to_blocks(s, 5, 90, 64), {1128, 72, 78, 0});
  CHECK_EQ(cut_to_blocks(s, 0, 3, 64).q_len, 0);  // before it
  CHECK_EQ(cut_to_blocks(s, 0, 3, 64).first_q_block, 3);
  CHECK_EQ(cut_to_blocks(s, 7, 9, 64).q_len, 0);  // behind it
  CHECK_EQ(cut_to_blocks(s, 7, 9, 64).first_q_block, 0);
  CHECK_EQ(cut_to_blocks(s, 4, 6, 64).kv_len, 150);
}

TEST(what_a_call_has_by_its_capacities) {
  const Call call({{200, 700}, {65, 130}, {300, 300}});
  PipelineParams p = call.params(BudgetMode::kTopP);
  const CallSizes sizes(p);
  CHECK_EQ(sizes.entries(), int64_t{1});
  CHECK_EQ(sizes.q_blocks(), int64_t{635 / 64 + 3});
  CHECK_EQ(sizes.kv_blocks(), int64_t{21});
  CHECK_EQ(sizes.q_windows(), int64_t{12 * 16});
  CHECK_EQ(sizes.kv_windows(), int64_t{(1200 / 512 + 3) * 128});
  CHECK_EQ(sizes.cells(), int64_t{2 * 12 * 21});
  p.packed.blocks = {3, 8};
  CHECK_EQ(sizes.q_blocks(), int64_t{5});
  CHECK_EQ(sizes.kv_windows(), int64_t{(1200 / 512 + 3) * 128});
}

// README's formula, of README's names.
struct Capacities {
  int64_t S, T, Tk, max_seqlen_k;
  bool paged;
};

PipelineParams params_of(const Capacities& c) {
  static const int32_t some_number = 0;
  PipelineParams p = Call({}).params(BudgetMode::kTopP);
  p.batch = c.S;
  p.kv_len = c.max_seqlen_k;
  p.dtype = DType::kBFloat16;
  p.packed.total_q = c.T;
  p.packed.total_kv = c.Tk;
  if (c.paged) {
    p.packed.kv_starts = nullptr;
    p.packed.kv_lens = p.packed.page_table = &some_number;
    p.packed.page_len = 16;
  }
  return p;
}

int64_t rounded(int64_t bytes) {
  return round_up(bytes, kWorkspaceAlignment);
}

// All query blocks at once.
int64_t formula(const PipelineParams& p, const Capacities& c) {
  const int64_t tokens = c.paged ? c.S * c.max_seqlen_k : c.Tk;
  const int64_t b = p.q_block;
  const int64_t s = p.stride;
  const int64_t g = p.proxy_heads;
  const int64_t rows = c.T / b + c.S;
  const int64_t ranking = 4 * rows * g * ceil_div(c.max_seqlen_k, b);
  const int64_t units = tokens / (128 * s) + c.S;
  return rounded(2 * units * 128 * min_of(g, p.kv_heads) * p.head_dim) +
         rounded(56 * c.S + 4 + 4 * rows + 4 * units) + rounded(4 * c.S * p.q_heads) +
         rounded(2 * rows * (b / s) * g * p.head_dim) + 3 * rounded(ranking) +
         rounded(4 * rows * p.q_heads) + rounded(PackedStages::kScratchBytes);
}

constexpr Capacities kCapacities[] = {{1, 100, 100, 100, false},
                                      {5, 1000, 3000, 2000, false},
                                      {32, 20000, 30000, 9000, false},
                                      {300, 300, 300000, 1000, false},
                                      {7, 5000, 64, 3000, true}};

TEST(memory_is_a_formula_of_the_capacities) {
  for (const Capacities& c : kCapacities) {
    PipelineParams p = params_of(c);
    CHECK_EQ(Attend(p).workspace_bytes(), formula(p, c));
    p.q_block = p.kv_block = 128;
    p.stride = 8;
    p.proxy_heads = 1;
    CHECK_EQ(Attend(p).workspace_bytes(), formula(p, c));
  }
}

TEST(scratch_of_the_estimate_is_within_its_bound) {
  for (const Capacities& c : kCapacities) {
    for (const int64_t block : {64, 128}) {
      PipelineParams p = params_of(c);
      p.q_block = p.kv_block = block;
      const int64_t tokens = c.paged ? c.S * c.max_seqlen_k : c.Tk;
      const int64_t bytes = cuda::NeedLayout(need_params(p, {})).bytes();
      // 288 MiB of 2^26 keys of one head each.
      CHECK(2 * bytes <= 9 * p.q_heads * (tokens + 2 * block * c.S));
    }
  }
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
