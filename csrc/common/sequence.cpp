#include "common/sequence.h"

namespace proxyattn {

int64_t sequence_table_bytes(const SequenceParams& params) {
  return SequenceTable::bytes(params.count,
                              max_packed_blocks(params.packed, params.count, params.q_block));
}

}  // namespace proxyattn
