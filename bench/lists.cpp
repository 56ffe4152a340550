#include "lists.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>

#include "proxyattn/error.h"

#include "random.h"

namespace proxyattn::bench {
namespace {

constexpr double kNestedShares[] = {0.5, 0.85, 1.15, 1.5};

// Moves a random choice of `wanted` of the entries to the front, in random order.
void draw(int32_t* begin, int64_t size, int64_t wanted, uint64_t seed) {
  for (int64_t i = 0; i < std::min(wanted, size - 1); ++i) {
    const auto left = static_cast<uint64_t>(size - i);
    const auto other = i + static_cast<int64_t>(mix(seed + static_cast<uint64_t>(i)) % left);
    std::swap(begin[i], begin[other]);
  }
}

int64_t count_of(double density, int64_t visible, int64_t num_forced) {
  const auto wanted = static_cast<int64_t>(std::ceil(density * static_cast<double>(visible)));
  return std::clamp(wanted, num_forced, visible);
}

uint64_t row_seed(int64_t list, int64_t m) {
  return mix(static_cast<uint64_t>(list) * 0x100000001u + static_cast<uint64_t>(m));
}

BlockLists random_lists(const Problem& problem, double density) {
  const BlockGrid grid = problem.grid();
  const int64_t num_blocks = problem.num_blocks();
  BlockLists lists;
  lists.list_heads = problem.q_heads;
  const int64_t num_rows = problem.batch * problem.q_heads * num_blocks;
  lists.indices.resize(static_cast<std::size_t>(num_rows * num_blocks));
  lists.counts.resize(static_cast<std::size_t>(num_rows));
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t m = row % num_blocks;
    const ForcedBlocks forced(grid, m, /*num_sink_blocks=*/0, /*num_local_blocks=*/1);
    const int64_t count = count_of(density, forced.visible, forced.count());
    int32_t* const list = lists.indices.data() + row * num_blocks;
    std::iota(list, list + forced.visible, 0);
    // The free blocks come first, so those drawn are joined to the forced ones behind them.
    const int64_t num_drawn = count - forced.count();
    draw(list, forced.local_begin, num_drawn, row_seed(row / num_blocks, m));
    std::copy(list + forced.local_begin, list + forced.visible, list + num_drawn);
    std::sort(list, list + count);
    lists.counts[static_cast<std::size_t>(row)] = static_cast<int32_t>(count);
    lists.num_executed += count;
  }
  return lists;
}

void rank(const Problem& problem, const ForcedBlocks& forced, uint64_t seed, int32_t* list) {
  for (int64_t i = 0; i < forced.count(); ++i) list[i] = static_cast<int32_t>(forced.block_at(i));
  int32_t* const free = list + forced.count();
  const int64_t num_free = forced.local_begin - forced.num_sinks;
  std::iota(free, free + num_free, static_cast<int32_t>(forced.num_sinks));
  draw(free, num_free, num_free, seed);
  std::fill(list + forced.visible, list + problem.num_blocks(), -1);
}

BlockLists nested_lists(const Problem& problem, double density) {
  const BlockGrid grid = problem.grid();
  const int64_t num_blocks = problem.num_blocks();
  const int64_t group = problem.q_heads / problem.proxy_heads;
  BlockLists lists;
  lists.list_heads = problem.proxy_heads;
  lists.indices.resize(static_cast<std::size_t>(problem.cells()));
  lists.counts.resize(static_cast<std::size_t>(problem.batch * problem.q_heads * num_blocks));
  for (int64_t row = 0; row < problem.batch * problem.proxy_heads * num_blocks; ++row) {
    const int64_t m = row % num_blocks;
    const int64_t list = row / num_blocks;
    const ForcedBlocks forced(grid, m, /*num_sink_blocks=*/1, /*num_local_blocks=*/1);
    rank(problem, forced, row_seed(list, m), lists.indices.data() + row * num_blocks);
    for (int64_t i = 0; i < group; ++i) {
      const int64_t head = list * group + i;
      const double share = kNestedShares[head % 4] * density;
      const int64_t count = count_of(share, forced.visible, std::max<int64_t>(1, forced.count()));
      lists.counts[static_cast<std::size_t>(head * num_blocks + m)] = static_cast<int32_t>(count);
      lists.num_executed += count;
    }
  }
  return lists;
}

}  // namespace

BlockLists make_lists(const Problem& problem, const std::string& kind) {
  if (kind == "all") {
    BlockLists lists;
    lists.num_executed = problem.batch * problem.q_heads * problem.visible_blocks();
    return lists;
  }
  const std::size_t colon = kind.find(':');
  const std::string name = kind.substr(0, colon);
  const double density =
      colon == std::string::npos ? 0.0 : std::strtod(kind.c_str() + colon + 1, nullptr);
  PROXYATTN_CHECK((name == "random" || name == "nested") && density > 0.0 && density <= 1.0,
                  "bench: lists must be all, random:<density> or nested:<density> with a density "
                  "in (0, 1], got ",
                  kind);
  return name == "random" ? random_lists(problem, density) : nested_lists(problem, density);
}

}  // namespace proxyattn::bench
