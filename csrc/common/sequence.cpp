#include "common/sequence.h"

namespace proxyattn {

int64_t sequence_table_bytes(const SequenceParams& params) {
  return SequenceTable::bytes(params);
}

}  // namespace proxyattn
