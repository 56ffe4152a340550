// Which calls of estimate_needs the sm90 family takes.
#include <cstdint>

#include "check.h"
#include "cuda/needs/dispatch.h"

namespace {

using namespace proxyattn;
using cuda::sm90::block_lse_fits;

constexpr int64_t kManyTokens = (int64_t{1} << 30) + 1;

const int32_t some_number = 0;
alignas(16) const char some_data[32] = {};

NeedParams some_params() {
  NeedParams p{};
  p.batch = 3;
  p.q_len = p.kv_len = 1000;
  p.q_heads = 8;
  p.kv_heads = 2;
  p.head_dim = 128;
  p.q_block = p.kv_block = 64;
  p.q_strides = {1000 * 8 * 128, 8 * 128, 128};
  p.k_strides = {1000 * 2 * 128, 2 * 128, 128};
  p.q = p.k = some_data;
  return p;
}

NeedParams packed_params() {
  NeedParams p = some_params();
  p.q_strides.batch = p.k_strides.batch = 0;  // there is none
  p.packed.q_starts = p.packed.kv_starts = &some_number;
  p.packed.total_q = 1500;
  p.packed.total_kv = 2500;
  return p;
}

NeedParams paged_params(int64_t page_len) {
  NeedParams p = packed_params();
  p.packed.kv_starts = nullptr;
  p.packed.kv_lens = p.packed.page_table = &some_number;
  p.packed.total_kv = 0;
  p.packed.table_pages = 100;
  p.packed.num_pages = 500;
  p.packed.page_len = page_len;
  p.k_strides = {2 * page_len * 2 * 128, 2 * 128, 128};
  return p;
}

template <typename Change>
bool fits_with(NeedParams p, const Change& change) {
  change(p);
  return block_lse_fits(p);
}

TEST(all_kinds_of_calls_are_taken) {
  CHECK(block_lse_fits(some_params()));
  CHECK(block_lse_fits(packed_params()));
  for (const int64_t page_len : {16, 32, 64, 128, 256})
    CHECK(block_lse_fits(paged_params(page_len)));
  // Of packed sequences the table says where they stand.
  CHECK(fits_with(packed_params(), [](NeedParams& p) { p.q_offset = -kManyTokens; }));
}

TEST(what_the_copy_engine_cannot_address_is_not) {
  for (const NeedParams& p : {some_params(), packed_params(), paged_params(16)}) {
    CHECK(!fits_with(p, [](NeedParams& x) { x.q = some_data + 8; }));
    CHECK(!fits_with(p, [](NeedParams& x) { x.k = some_data + 2; }));
    CHECK(!fits_with(p, [](NeedParams& x) { x.q_strides.token += 1; }));
    CHECK(!fits_with(p, [](NeedParams& x) { x.k_strides.head += 4; }));
  }
  CHECK(!fits_with(some_params(), [](NeedParams& x) { x.q_strides.batch += 1; }));
  CHECK(!fits_with(paged_params(64), [](NeedParams& x) { x.k_strides.batch += 1; }));
  // Runs of 16 keys are a dimension of packed keys, and of pages are not.
  const int64_t far = int64_t{1} << 36;
  CHECK(!fits_with(packed_params(), [](NeedParams& x) { x.k_strides.token = far; }));
  CHECK(fits_with(paged_params(64), [](NeedParams& x) { x.k_strides.token = far; }));
}

TEST(nor_is_nothing_or_what_32_bits_do_not_count) {
  CHECK(!fits_with(packed_params(), [](NeedParams& x) { x.packed.total_q = 0; }));
  CHECK(!fits_with(packed_params(), [](NeedParams& x) { x.packed.total_kv = 0; }));
  CHECK(!fits_with(paged_params(16), [](NeedParams& x) { x.packed.num_pages = 0; }));
  CHECK(!fits_with(packed_params(), [](NeedParams& x) { x.packed.total_q = kManyTokens; }));
  CHECK(!fits_with(packed_params(), [](NeedParams& x) { x.packed.total_kv = kManyTokens; }));
  CHECK(!fits_with(paged_params(16), [](NeedParams& x) { x.packed.num_pages = kManyTokens; }));
  CHECK(!fits_with(some_params(), [](NeedParams& x) { x.q_offset = -kManyTokens; }));
  CHECK(!fits_with(some_params(), [](NeedParams& x) { x.batch = int64_t{1} << 24; }));
}

}  // namespace

int main() {
  return proxyattn::test::run_all();
}
