// The softmax of some query rows over all their keys, summed up by key block: what score_blocks and
// estimate_needs share. Keys are read once; per row and key block the largest score and the sum
// of exponentials relative to it are kept, from which probabilities follow when all blocks are
// known.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"
#include "cpu/tiles.h"

namespace proxyattn::cpu {

inline constexpr int64_t kMaxScanRows = 128;

struct BlockScan {
  HeadRows queries;
  HeadRows keys;
  int64_t num_rows;  // at most kMaxScanRows
  int64_t num_keys;
  int64_t keys_per_block;  // divides kMaxTileKeys
  int64_t head_dim;
  int64_t first_block;  // key blocks before it don't exist for these rows
  int64_t first_seen;   // row i sees the first min(first_seen + i, num_keys) keys; below 0: none
  float scale;

  int64_t seen(int64_t row) const { return max_of<int64_t>(0, min_of(first_seen + row, num_keys)); }
  // The end of the key blocks that any row sees.
  int64_t end_block() const { return ceil_div(seen(num_rows - 1), keys_per_block); }
  // The first row that sees key block n; later ones do too.
  int64_t first_row(int64_t n) const {
    return max_of<int64_t>(0, n * keys_per_block + 1 - first_seen);
  }
};

// Statistics of kMaxScanRows rows for each key block. After finish_scan: top is the largest
// log-probability in the block and sum the block's probability, for the rows that see it.
struct BlockStats {
  float* top;  // [blocks][kMaxScanRows]
  float* sum;  // [blocks][kMaxScanRows]

  BlockStats(ScratchLayout& layout, int64_t num_blocks)
      : top(layout.take<float>(num_blocks * kMaxScanRows)),
        sum(layout.take<float>(num_blocks * kMaxScanRows)) {}
};

struct ScanScratch {
  float* queries;  // panels
  float* keys;     // [kMaxTileKeys][head_dim]
  float* scores;   // [kMaxTileKeys][panel]

  ScanScratch(ScratchLayout& layout, int64_t head_dim)
      : queries(layout.take<float>(kMaxScanRows * head_dim)),
        keys(layout.take<float>(kMaxTileKeys * head_dim)),
        scores(layout.take<float>(kMaxTileKeys * kMaxPanel)) {}
};

// Fills the statistics of key blocks [begin, end), which lie in [first_block, end_block()).
void scan_blocks(const Kernels& kernels,
                 const BlockScan& scan,
                 int64_t begin,
                 int64_t end,
                 const ScanScratch& scratch,
                 const BlockStats& stats);

// Hides the key blocks before `first_block` from rows [begin, end), whose statistics are known.
void hide_blocks(const BlockScan& scan,
                 const BlockStats& stats,
                 int64_t begin,
                 int64_t end,
                 int64_t first_block);

// Turns the statistics of all blocks [first_block, end_block()) into probabilities.
void finish_scan(const Kernels& kernels, const BlockScan& scan, const BlockStats& stats);

}  // namespace proxyattn::cpu
