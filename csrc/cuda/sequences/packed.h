// Packed sequences in the params of any stage, and their table as the device reads it.
#pragma once

#include <cstdint>

#include "proxyattn/sequences.h"

#include "common/block_grid.h"
#include "common/sequence.h"

namespace proxyattn::cuda {

template <typename Params>
bool is_packed(const Params& p) {
  return p.packed.q_starts != nullptr;
}

// Stages are handed a table that is made. Without packed sequences: of none.
template <typename Params>
SequenceTable packed_table(const Params& p) {
  if (!is_packed(p)) return {};
  SequenceParams made_of{};
  made_of.count = p.batch;
  made_of.max_kv_len = p.kv_len;
  made_of.q_block = p.q_block;
  made_of.stride = p.packed.table_stride;
  made_of.packed = p.packed;
  return SequenceTable(p.packed.table, made_of);
}

// The blocks of one sequence of a call, numbered as those of a call of its own.
PROXYATTN_HOST_DEVICE BlockGrid sequence_grid(BlockGrid call, const Sequence& sequence) {
  call.q_len = sequence.q_len;
  call.kv_len = sequence.kv_len;
  call.q_offset = sequence.offset;
  return call;
}

}  // namespace proxyattn::cuda
