// What select_blocks works on: the lists of query blocks, of a batch or of packed sequences, and
// which of them a launch takes.
#pragma once

#include <cstdint>

#include "common/block_grid.h"
#include "common/math.h"
#include "common/sequence.h"
#include "cuda/sequences/packed.h"

namespace proxyattn::cuda {

// Which query blocks a tensor has rows for.
struct RowsHeld {
  int64_t first;
  int64_t count;
};

// A query block, as a call of its sequence alone would have it.
struct QueryBlock {
  BlockGrid grid;
  int64_t m;
  int64_t sequence;  // of the call; 0 in a batch
};

struct SelectArgs {
  BlockGrid grid;        // of packed sequences: of the most tokens that one may have
  SequenceTable packed;  // of no sequences: a batch
  int64_t num_sink_blocks;
  int64_t num_local_blocks;
  int64_t num_lists;      // batch * proxy_heads; of packed sequences: proxy_heads
  RowsHeld scores;        // peak and mass
  RowsHeld lists;         // indices and counts
  int64_t num_blocks;     // key blocks that peak and mass have room for
  int64_t list_capacity;  // entries that a list has room for
  int64_t list_heads;     // query heads that read one list
  int64_t min_blocks;
  bool only_prefixes;
  const float* peak;
  const float* mass;       // null unless top-p
  const int32_t* budgets;  // null with top-p
  const float* shares;     // null unless top-p
  int32_t* indices;
  int32_t* counts;
  double gamma;

  PROXYATTN_HOST_DEVICE bool is_packed() const { return packed.count > 0; }

  PROXYATTN_HOST_DEVICE QueryBlock query_block(int64_t block) const {
    if (!is_packed()) return {grid, block, 0};
    const Sequence& s = packed.sequences[packed.block_sequence[block]];
    return {sequence_grid(grid, s), block - s.first_q_block, s.idx};
  }
};

// Readers look at a list's first entries before they know how many there are, this many together.
inline constexpr int kListEntriesRead = 32;

// What a thread block must know of its row: one proxy head's of one query block, which is numbered
// over all packed sequences. Kept in shared memory, because the sort needs every register.
struct Row {
  const float* peak;
  const float* mass;
  int32_t* ranking;
  int32_t* counts;     // of the list's first head; the next one's is args.lists.count further
  int64_t first_need;  // of that head, in budgets or shares
  ForcedBlocks forced;
  int num_forced;
  int visible;   // key blocks that it sees
  int list_end;  // entries that are written

  PROXYATTN_HOST_DEVICE Row(const SelectArgs& args, int64_t list, int64_t block)
      : Row(args, list, block, args.query_block(block)) {}

 private:
  PROXYATTN_HOST_DEVICE Row(const SelectArgs& args,
                            int64_t list,
                            int64_t block,
                            const QueryBlock& own)
      : first_need((own.sequence * args.num_lists + list) * args.list_heads),
        forced(own.grid, own.m, args.num_sink_blocks, args.num_local_blocks) {
    const int64_t score_row = list * args.scores.count + block - args.scores.first;
    const int64_t list_row = list * args.lists.count + block - args.lists.first;
    peak = args.peak + score_row * args.num_blocks;
    mass = args.mass == nullptr ? nullptr : args.mass + score_row * args.num_blocks;
    ranking = args.indices + list_row * args.list_capacity;
    counts = args.counts + list * args.list_heads * args.lists.count + block - args.lists.first;
    num_forced = static_cast<int>(forced.count());
    visible = static_cast<int>(forced.num_visible());
    list_end = static_cast<int>(args.list_capacity);
    // Of lists that stay inside, short sequences' are mostly room.
    if (args.is_packed() && args.only_prefixes) {
      list_end = min_of(list_end, round_up(visible, kListEntriesRead));
    }
  }
};

// The rows that a launch takes: its units, of which each thread block has every gridDim.x-th, as
// far as they are of the class.
struct RowClass {
  static constexpr int64_t kNoUnit = -1;

  int64_t end_block;  // batch: the query block behind the first one taken; they go down from there
  int too_short;      // visible blocks of a row that the class below takes
  int capacity;       // and the most that this one takes

  struct Unit {
    int64_t list;
    int64_t block;
  };

  PROXYATTN_HOST_DEVICE Unit unit(const SelectArgs& args, int64_t idx) const {
    const int64_t row = idx / args.num_lists;
    const int64_t list = idx - row * args.num_lists;
    return {list, args.is_packed() ? args.scores.first + row : end_block - 1 - row};
  }

  PROXYATTN_HOST_DEVICE bool takes(int64_t visible) const {
    return too_short < visible && visible <= capacity;
  }

  enum class Match { kNo, kYes, kNoneLeft };

  // Whether a packed row is of this class. Where it is no sequence's, neither are those behind it.
  PROXYATTN_HOST_DEVICE Match match(const SelectArgs& args, int64_t block) const {
    const bool exists = block < args.scores.first + args.scores.count &&
                        args.packed.block_sequence[block] < args.packed.count;
    if (!exists) return Match::kNoneLeft;
    const QueryBlock own = args.query_block(block);
    return takes(own.grid.num_visible(own.m)) ? Match::kYes : Match::kNo;
  }
};

}  // namespace proxyattn::cuda
