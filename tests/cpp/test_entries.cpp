// What the CPU's public functions refuse of a batch and of packed sequences.
#include "entries.h"

namespace proxyattn {
namespace {

const test::Entries kEntries = {
    cpu::pool_heads,     cpu::score_blocks,           cpu::estimate_needs,
    cpu::select_blocks,  cpu::block_sparse_attention, cpu::choose_blocks,
    cpu::proxy_attention};

TEST(queries_of_a_batch_must_not_outnumber_keys) {
  check_all_alignments(kEntries);
}

TEST(stages_take_a_batch) {
  check_all_packed(kEntries, ": sequences must be a batch on a CPU, got packed ones");
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
