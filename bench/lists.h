// Block lists to attend over: all blocks, random ones, or nested prefixes as the selection makes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "problem.h"

namespace proxyattn::bench {

struct BlockLists {
  int64_t list_heads = 1;
  std::vector<int32_t> indices;  // [batch, list_heads, num_blocks, num_blocks]; empty: all blocks
  std::vector<int32_t> counts;   // [batch, q_heads, num_blocks]; empty if and only if indices is
  int64_t num_executed = 0;      // blocks over all heads
};

// `kind` is "all", "random:<density>" or "nested:<density>", the density being the share of each
// row's visible blocks.
// - random: lists of each head's own, ascending, with the blocks on the diagonal always in;
// - nested: one ranking per proxy head, the forced blocks first and the others in random order;
//   the heads of a group take .5, .85, 1.15 and 1.5 times the density, and so on around.
BlockLists make_lists(const Problem& problem, const std::string& kind);

}  // namespace proxyattn::bench
