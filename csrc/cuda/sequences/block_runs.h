// Runs of neighbouring blocks over packed sequences, none of which has blocks of two.
#pragma once

#include <cstdint>

#include "common/sequence.h"

namespace proxyattn::cuda {

// A run has up to run_blocks blocks, and each sequence begins one. Runs are numbered sequence by
// sequence; as where a sequence's begin follows from the blocks before it, and not from the runs,
// a number at the end of each may be no run's.
template <int32_t Sequence::* kFirstBlock>
struct BlockRuns {
  SequenceTable table;
  int32_t run_blocks;

  // More numbers than there are for so many blocks of all sequences.
  static int64_t capacity(int64_t max_blocks, int64_t run_blocks, int64_t count) {
    return max_blocks / run_blocks + count;
  }

  PROXYATTN_HOST_DEVICE int32_t first_run(const Sequence& sequence) const {
    return sequence.*kFirstBlock / run_blocks + sequence.idx;
  }

  // The last sequence that begins with this run or before.
  PROXYATTN_HOST_DEVICE const Sequence& owner(int32_t run) const {
    int32_t begin = 0;
    for (int32_t end = table.count; end - begin > 1;) {
      const int32_t middle = (begin + end) / 2;
      (first_run(table.sequences[middle]) <= run ? begin : end) = middle;
    }
    return table.sequences[begin];
  }
};

using QueryRuns = BlockRuns<&Sequence::first_q_block>;
using KeyRuns = BlockRuns<&Sequence::first_kv_block>;

}  // namespace proxyattn::cuda
