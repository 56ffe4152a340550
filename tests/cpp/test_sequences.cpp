// Packed sequences: what becomes of starts, lengths and pages that may be any number, and that the
// CPU's scratch is enough for whatever they say.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "proxyattn/attention.h"
#include "proxyattn/error.h"
#include "proxyattn/pipeline.h"

#include "check.h"
#include "common/math.h"
#include "common/sequence.h"
#include "common/validate.h"
#include "tensors.h"

namespace proxyattn {
namespace {

using test::Tensor;
using Numbers = std::vector<int32_t>;

constexpr int64_t kBlock = 64;
constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();
constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
const Numbers kHostile = {kLeast, kLeast + 1, -1000, -64,       -1,        0,    1,   15,
                          16,     63,         64,    65,        100,       129,  200, 300,
                          301,    1000,       65536, kMost / 2, kMost - 1, kMost};

int32_t any_of(const Numbers& numbers, std::mt19937& random) {
  return numbers[random() % numbers.size()];
}

// The numbers of a call, and what points to them.
struct Call {
  Numbers q_starts, kv_starts, kv_lens, page_table;
  PackedSequences packed;
  int64_t max_q_len = 0;
  int64_t max_kv_len = 0;

  int64_t count() const { return static_cast<int64_t>(q_starts.size()) - 1; }

  void point() {
    const auto data = [](const Numbers& numbers) {
      return numbers.empty() ? nullptr : numbers.data();
    };
    packed.q_starts = q_starts.data();
    packed.kv_starts = data(kv_starts);
    packed.kv_lens = data(kv_lens);
    packed.page_table = data(page_table);
  }

  std::vector<Sequence> read() const {
    SequenceReader reader(packed, sequence_limits(packed, max_q_len, max_kv_len), kBlock);
    std::vector<Sequence> sequences;
    for (int64_t i = 0; i < count(); ++i) sequences.push_back(reader.next());
    return sequences;
  }
};

Call packed_call(Numbers q_starts, Numbers kv_starts, int64_t total_q, int64_t total_kv) {
  Call call;
  call.q_starts = std::move(q_starts);
  call.kv_starts = std::move(kv_starts);
  call.packed.total_q = total_q;
  call.packed.total_kv = total_kv;
  call.max_q_len = call.max_kv_len = 1000;
  call.point();
  return call;
}

Call paged_call(Numbers q_starts, Numbers kv_lens, int64_t total_q, int64_t table_pages) {
  Call call;
  call.q_starts = std::move(q_starts);
  call.kv_lens = std::move(kv_lens);
  call.page_table.assign(static_cast<std::size_t>(call.count() * table_pages + 1), 0);
  call.packed.total_q = total_q;
  call.packed.table_pages = table_pages;
  call.packed.num_pages = 7;
  call.packed.page_len = 16;
  call.max_q_len = call.max_kv_len = 1000;
  call.point();
  return call;
}

void check_sequence(const Sequence& s, const Numbers& expected) {
  CHECK((Numbers{s.q_start, s.q_len, s.kv_start, s.kv_len, s.first_q_block, s.idx, s.offset} ==
         expected));
}

TEST(good_numbers_are_taken_as_they_are) {
  const Call packed = packed_call({0, 100, 100, 230}, {3, 303, 310, 320}, 240, 330);
  const std::vector<Sequence> sequences = packed.read();
  check_sequence(sequences[0], {0, 100, 3, 300, 0, 0, 200});
  check_sequence(sequences[1], {100, 0, 303, 7, 2, 1, 7});
  check_sequence(sequences[2], {100, 130, 310, 10, 2, 2, -120});
  const Call paged = paged_call({5, 70, 71}, {65, 200}, 80, 13);
  check_sequence(paged.read()[0], {5, 65, 0, 65, 0, 0, 0});
  check_sequence(paged.read()[1], {70, 1, 0, 200, 2, 1, 199});
}

TEST(packed_keys_may_be_used_in_part) {
  Call call = packed_call({0, 10, 20}, {0, 100, 200}, 20, 200);
  call.kv_lens = {30, 130};
  call.point();
  check_sequence(call.read()[0], {0, 10, 0, 30, 0, 0, 20});
  check_sequence(call.read()[1], {10, 10, 100, 100, 1, 1, 90});
}

TEST(bad_numbers_are_cut) {
  // Down and up again, and past the end of 240 tokens.
  const Call packed = packed_call({-5, 100, 40, 500}, {0, 400, 50, 330}, 240, 330);
  check_sequence(packed.read()[0], {0, 100, 0, 330, 0, 0, 230});
  check_sequence(packed.read()[1], {100, 0, 330, 0, 2, 1, 0});
  check_sequence(packed.read()[2], {100, 140, 330, 0, 2, 2, -140});
  // The table has room for 13 pages of 16 tokens.
  Call paged = paged_call({0, 50, 80}, {1000, -7}, 80, 13);
  check_sequence(paged.read()[0], {0, 50, 0, 208, 0, 0, 158});
  check_sequence(paged.read()[1], {50, 30, 0, 0, 1, 1, -30});
  // Capacities cut queries at the end of a sequence; the next begins where it says.
  paged.max_q_len = 20;
  paged.max_kv_len = 100;
  check_sequence(paged.read()[0], {0, 20, 0, 100, 0, 0, 80});
  check_sequence(paged.read()[1], {50, 20, 0, 0, 1, 1, -20});
}

void check_inside(const Call& call) {
  const bool paged = call.packed.page_table != nullptr;
  int64_t blocks = 0;
  int64_t q_end = 0;
  int64_t kv_end = 0;
  for (const Sequence& s : call.read()) {
    CHECK(0 <= s.q_len && s.q_len <= call.max_q_len);
    CHECK(0 <= s.kv_len && s.kv_len <= call.max_kv_len);
    CHECK(q_end <= s.q_start && s.q_start + s.q_len <= call.packed.total_q);
    CHECK_EQ(s.offset, s.kv_len - s.q_len);
    CHECK_EQ(s.first_q_block, blocks);
    if (paged) {
      CHECK_EQ(s.kv_start, 0);
      CHECK(s.kv_len <= call.packed.table_pages * call.packed.page_len);
    } else {
      CHECK(kv_end <= s.kv_start && s.kv_start + s.kv_len <= call.packed.total_kv);
    }
    q_end = s.q_start + s.q_len;
    kv_end = s.kv_start + s.kv_len;
    blocks += ceil_div<int64_t>(s.q_len, kBlock);
  }
  CHECK(blocks <= max_packed_blocks(call.packed, call.count(), kBlock));
}

Numbers hostile(std::size_t count, std::mt19937& random) {
  Numbers numbers(count);
  for (int32_t& number : numbers) number = any_of(kHostile, random);
  return numbers;
}

Call hostile_call(std::mt19937& random) {
  const std::size_t count = random() % 6;
  const int64_t total_q = random() % 400;
  Call call = random() % 2 == 0
                  ? packed_call(hostile(count + 1, random), hostile(count + 1, random), total_q,
                                static_cast<int64_t>(random() % 400))
                  : paged_call(hostile(count + 1, random), hostile(count + 1, random), total_q,
                               static_cast<int64_t>(random() % 20));
  if (call.packed.page_table == nullptr && random() % 2 == 0) {
    call.kv_lens = hostile(count + 1, random);
  }
  for (int32_t& id : call.page_table) id = any_of(kHostile, random);
  call.max_q_len = 1 + static_cast<int64_t>(random() % 300);
  call.max_kv_len = 1 + static_cast<int64_t>(random() % 300);
  call.point();
  return call;
}

TEST(no_number_leads_outside) {
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) check_inside(hostile_call(random));
}

TEST(totals_beyond_32_bits_are_cut_too) {
  Call call = packed_call({0, kMost}, {0, kMost}, int64_t{1} << 40, int64_t{1} << 40);
  call.max_q_len = call.max_kv_len = int64_t{1} << 50;
  check_sequence(call.read()[0], {0, kMost, 0, kMost, 0, 0, 0});
}

// As a kernel does it: every start cut for itself, then a running maximum.
TEST(starts_rise_whichever_way_they_are_cut) {
  std::mt19937 random(2);
  for (int i = 0; i < 5000; ++i) {
    const Call call = hostile_call(random);
    const SequenceLimits limits = sequence_limits(call.packed, call.max_q_len, call.max_kv_len);
    const auto rising = [&](const Numbers& starts, int32_t total) {
      Numbers cut;
      for (const int32_t start : starts) {
        const int32_t own = cut_start(start, 0, total);
        cut.push_back(cut.empty() ? own : std::max(cut.back(), own));
      }
      return cut;
    };
    const Numbers q = rising(call.q_starts, limits.total_q);
    const Numbers kv = rising(call.kv_starts, limits.total_kv);
    const std::vector<Sequence> sequences = call.read();
    for (std::size_t idx = 0; idx < sequences.size(); ++idx) {
      const TokenSpan kv_span = kv.empty() ? TokenSpan{} : TokenSpan{kv[idx], kv[idx + 1]};
      const Sequence& want = sequences[idx];
      const Sequence got = cut_sequence(call.packed, limits, static_cast<int32_t>(idx),
                                        {q[idx], q[idx + 1]}, kv_span);
      check_sequence(
          got, {want.q_start, want.q_len, want.kv_start, want.kv_len, 0, want.idx, want.offset});
    }
  }
}

TEST(pages_that_there_are_none_of) {
  Call call = paged_call({0, 5, 9}, {40, 40}, 9, 3);
  call.page_table = {6, 0, -1, 7, kLeast, kMost};
  call.point();
  CHECK_EQ(cut_page(call.packed, 0, 0), 6);
  CHECK_EQ(cut_page(call.packed, 0, 1), 0);
  CHECK_EQ(cut_page(call.packed, 0, 2), -1);
  for (int64_t page = 0; page < 3; ++page) CHECK_EQ(cut_page(call.packed, 1, page), -1);
}

TEST(numbers_below_zero_are_rounded_down) {
  for (int64_t denominator = 1; denominator <= 8; ++denominator) {
    for (int64_t numerator = -40; numerator <= 40; ++numerator) {
      const int64_t result = floor_div(numerator, denominator);
      CHECK(result * denominator <= numerator && numerator < (result + 1) * denominator);
    }
  }
}

// ---- calls on the CPU

struct Tensors {
  Tensor q{DType::kBFloat16, 1, 400, 4, 64};
  Tensor k{DType::kBFloat16, 1, 400, 2, 64};
  Tensor v{DType::kBFloat16, 1, 400, 2, 64};
  Tensor out{DType::kBFloat16, 1, 400, 4, 64};  // NaN
  std::vector<float> lse = std::vector<float>(1600, -7.0f);
};

const Tensors& random_tensors() {
  static const Tensors tensors = [] {
    Tensors t;
    t.q.fill_normal(1);
    t.k.fill_normal(2);
    t.v.fill_normal(3);
    return t;
  }();
  return tensors;
}

template <typename Params>
void set_shape(const Call& call, Params& p) {
  const Tensors& in = random_tensors();
  p.batch = call.count();
  p.q_len = call.max_q_len;
  p.kv_len = call.max_kv_len;
  p.q_heads = 4;
  p.kv_heads = 2;
  p.head_dim = 64;
  p.q_block = p.kv_block = kBlock;
  p.q_strides = in.q.strides;
  p.k_strides = p.v_strides = in.k.strides;
  // Pages lie one behind another in what else is one long sequence.
  if (call.packed.page_table != nullptr) {
    p.k_strides.batch = p.v_strides.batch = 16 * in.k.strides.token;
  }
  p.q = in.q.data();
  p.k = in.k.data();
  p.v = in.v.data();
  p.scale = 0.2f;
  p.causal = true;
  p.dtype = DType::kBFloat16;
  p.packed = call.packed;
}

template <typename Params>
void set_outputs(Tensors& to, Params& p) {
  p.out = to.out.data();
  p.out_strides = to.out.strides;
  p.lse = to.lse.data();
  p.lse_pitch = p.packed.total_q;
}

PipelineParams pipeline_params(const Call& call, BudgetMode mode) {
  PipelineParams p{};
  set_shape(call, p);
  p.proxy_heads = 2;
  p.stride = 4;
  p.num_sink_blocks = p.num_local_blocks = 1;
  p.max_workspace_bytes = std::numeric_limits<int64_t>::max();
  p.gamma = 0.5;
  p.pooling = Pooling::kMean;
  p.budget_mode = mode;
  return p;
}

// What no sequence says is its own stays as it was.
void check_rest(const Call& call, const Tensors& got) {
  const Tensors& untouched = random_tensors();
  std::vector<bool> used(400, false);
  for (const Sequence& s : call.read()) {
    std::fill_n(used.begin() + s.q_start, s.q_len, true);
  }
  for (int64_t t = 0; t < 400; ++t) {
    const double value = got.out.at(0, t, 3, 63);
    CHECK(used[static_cast<std::size_t>(t)] != test::near(value, untouched.out.at(0, t, 3, 63), 0));
  }
}

// The least that an op may be given, by its own word.
int64_t least_workspace(PipelineParams p) {
  p.max_workspace_bytes = 0;
  try {
    cpu::proxy_attention_workspace_bytes(p);
  } catch (const InvalidArgument& error) {
    const std::string text = error.what();
    return std::stoll(text.substr(text.find("at least ") + 9));
  }
  return 0;
}

TEST(scratch_of_the_capacities_is_enough_whatever_the_numbers_say) {
  std::mt19937 random(3);
  for (int i = 0; i < 60; ++i) {
    const Call call = hostile_call(random);
    for (const BudgetMode mode : {BudgetMode::kTopP, BudgetMode::kLastBlock}) {
      PipelineParams p = pipeline_params(call, mode);
      for (const int64_t limit : {p.max_workspace_bytes, least_workspace(p)}) {
        Tensors to;
        p.max_workspace_bytes = limit;
        set_outputs(to, p);
        const test::Workspace workspace(p, cpu::proxy_attention_workspace_bytes(p));
        cpu::proxy_attention(p);
        check_rest(call, to);
      }
    }
  }
}

// Lists in the order of the blocks, of which every head reads another number.
struct Lists {
  int64_t num_rows;
  Numbers indices, counts;

  explicit Lists(const Call& call)
      : num_rows(max_packed_blocks(call.packed, call.count(), kBlock)) {
    for (int64_t i = 0; i < num_rows; ++i) indices.insert(indices.end(), {0, 1, 2, 3, 4});
    const std::vector<Sequence> sequences = call.read();
    for (int64_t head = 0; head < 4; ++head) {
      Numbers own(static_cast<std::size_t>(num_rows), kLeast);  // never to be looked at
      for (const Sequence& s : sequences) {
        const int64_t blocks = min_of<int64_t>(head + 1, ceil_div<int64_t>(s.kv_len, kBlock));
        std::fill_n(own.begin() + s.first_q_block, ceil_div<int64_t>(s.q_len, kBlock),
                    static_cast<int32_t>(blocks));
      }
      counts.insert(counts.end(), own.begin(), own.end());
    }
  }
};

void attend(const Call& call, const Lists& lists, const BlockRange& rows, Tensors& to) {
  AttentionParams p{};
  set_shape(call, p);
  set_outputs(to, p);
  p.list_heads = 1;
  p.list_capacity = 5;
  p.rows = rows;
  p.list_rows = {0, lists.num_rows};
  p.indices = lists.indices.data();
  p.counts = lists.counts.data();
  const test::Workspace workspace(p, cpu::block_sparse_attention_workspace_bytes(p));
  cpu::block_sparse_attention(p);
}

TEST(query_blocks_of_all_sequences_can_be_worked_through_in_pieces) {
  std::mt19937 random(4);
  for (int i = 0; i < 40; ++i) {
    const Call call = hostile_call(random);
    const Lists lists(call);
    Tensors whole, pieces;
    attend(call, lists, {0, lists.num_rows}, whole);
    for (int64_t begin = 0; begin < lists.num_rows;) {
      const int64_t end = min_of<int64_t>(begin + 1 + random() % 3, lists.num_rows);
      attend(call, lists, {begin, end}, pieces);
      begin = end;
    }
    CHECK(pieces.out.same_bits(whole.out));
    CHECK(pieces.lse == whole.lse);
    check_rest(call, whole);
  }
}

TEST(rules) {
  const std::string op = "proxy_attention_varlen: ";
  const auto check_refused = [&](const Call& call, const std::string& text) {
    PipelineParams p = pipeline_params(call, BudgetMode::kTopP);
    CHECK_THROWS(InvalidArgument, op + text, cpu::proxy_attention_workspace_bytes(p));
  };
  const Call packed = packed_call({0, 5}, {0, 9}, 5, 9);
  const Call paged = paged_call({0, 5}, {40}, 5, 3);
  Call call = packed;
  call.max_q_len = 0;
  check_refused(call, "max_seqlen_q must be at least 1, got max_seqlen_q=0");
  call = paged;
  call.max_kv_len = -1;
  check_refused(call, "max_seqlen_k must be at least 1, got max_seqlen_k=-1");
  call = packed;
  call.packed.kv_starts = nullptr;
  check_refused(call, "one of cu_seqlens_k and block_table must be given, got neither");
  call = paged;
  call.packed.kv_starts = call.packed.kv_lens;
  check_refused(call, "one of cu_seqlens_k and block_table must be given, got both");
  call = paged;
  call.packed.kv_lens = nullptr;
  check_refused(call, "seqused_k must be given with block_table, got None");
  for (const int64_t page_len : {0, 8, 48, 512}) {
    call = paged;
    call.packed.page_len = page_len;
    check_refused(call, "pages of k must hold one of 16, 32, 64, 128, 256 tokens, got k.size(1)=" +
                            std::to_string(page_len));
  }
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
