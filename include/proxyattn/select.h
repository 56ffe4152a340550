// Stage 4, select_blocks: one ranking per proxy and query block, one prefix length per head.
#pragma once

#include <cstdint>

#include "proxyattn/sequences.h"
#include "proxyattn/types.h"

namespace proxyattn {

struct SelectParams {
  int64_t batch;
  int64_t q_len;
  int64_t kv_len;
  int64_t q_heads;
  int64_t proxy_heads;
  int64_t q_block;
  int64_t kv_block;
  int64_t q_offset;    // position of query 0
  int64_t window;      // keys that a query sees, its own the last; 0: all up to its own
  int64_t min_budget;  // tokens
  int64_t num_sink_blocks;
  int64_t num_local_blocks;
  BlockRange rows;        // query blocks to select for, and those that peak and mass hold
  BlockRange list_rows;   // query blocks that indices and counts hold; includes `rows`
  int64_t list_capacity;  // entries that a list has room for, at least all key blocks

  const float* peak;       // [batch, proxy_heads, rows, ceil(kv_len / kv_block)]
  const float* mass;       // same shape; null unless budget_mode is kTopP
  const int32_t* budgets;  // [batch, q_heads]; null unless kLastBlock
  const float* shares;     // [batch, q_heads]; null unless kTopP
  int32_t* indices;        // [batch, proxy_heads, list_rows, list_capacity], -1 past visible
  int32_t* counts;         // [batch, q_heads, list_rows]

  double gamma;  // kTopP: share of its attention that a head keeps
  BudgetMode budget_mode;
  bool causal;

  // Whether a ranking need only be in order as far as prefixes that heads read end in it; behind
  // the longest of those, one to the end of the list not counted, the blocks may stand in any
  // order. Where no place need be in order the row's peaks are not read.
  bool only_prefixes = false;

  PackedSequences packed;  // without q_starts: a batch
};

namespace cpu {
void select_blocks(const SelectParams& params);
}
namespace cuda {
void select_blocks(const SelectParams& params, Stream stream);
}

}  // namespace proxyattn
