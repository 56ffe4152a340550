// What the public functions for GPUs refuse of a batch and of packed sequences; no GPU is needed.
#include "entries.h"

namespace proxyattn {
namespace {

// On the default stream.
template <auto kFunction, typename Params>
void call(const Params& params) {
  kFunction(params, nullptr);
}

const test::Entries kEntries = {call<cuda::pool_heads, PoolParams>,
                                call<cuda::score_blocks, ScoreParams>,
                                call<cuda::estimate_needs, NeedParams>,
                                call<cuda::select_blocks, SelectParams>,
                                call<cuda::block_sparse_attention, AttentionParams>,
                                call<cuda::choose_blocks, PipelineParams>,
                                call<cuda::proxy_attention, PipelineParams>};

TEST(queries_of_a_batch_must_not_outnumber_keys) {
  check_all_alignments(kEntries);
}

TEST(stages_want_packed_sequences_prepared) {
  check_all_packed(kEntries, ": packed sequences must have been prepared, got no table of them");
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
