#include "cpu/block_scan.h"

#include <algorithm>
#include <limits>

namespace proxyattn::cpu {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Statistics of one panel of rows for the key blocks [block, block_end) of one tile.
void scan_panel(const Kernels& kernels,
                const BlockScan& scan,
                int64_t panel_idx,
                int64_t block,
                int64_t block_end,
                const ScanScratch& scratch,
                const BlockStats& stats) {
  const int64_t row = panel_idx * kernels.panel;
  const int64_t last_row = min_of(row + kernels.panel, scan.num_rows) - 1;
  const int64_t first_key = block * scan.keys_per_block;
  const int64_t tile_keys =
      min_of((block_end - block) * scan.keys_per_block, scan.num_keys - first_key);
  // Keys of the tile that a row sees, those that the panel's last row sees being computed at all.
  const auto tile_seen = [&](int64_t r) {
    return max_of<int64_t>(0, min_of(scan.seen(r) - first_key, tile_keys));
  };
  const int64_t num_keys = tile_seen(last_row);
  float* top = stats.top + block * kMaxScanRows + row;
  float* sum = stats.sum + block * kMaxScanRows + row;
  if (num_keys > 0) {
    kernels.scores(scratch.queries + row * scan.head_dim, scratch.keys, num_keys, scan.head_dim,
                   scratch.scores);
    if (tile_seen(row) < num_keys) {
      const int32_t first_seen[kMaxPanel] = {};
      int32_t end_seen[kMaxPanel];
      for (int64_t lane = 0; lane < kernels.panel; ++lane) {
        end_seen[lane] = static_cast<int32_t>(tile_seen(min_of(row + lane, last_row)));
      }
      kernels.mask(first_seen, end_seen, num_keys, scratch.scores);
    }
    kernels.block_stats(scratch.scores, num_keys, scan.keys_per_block, kMaxScanRows, top, sum);
  }
  for (int64_t i = ceil_div(num_keys, scan.keys_per_block); i < block_end - block; ++i) {
    std::fill_n(top + i * kMaxScanRows, kernels.panel, kMinusInf);
    std::fill_n(sum + i * kMaxScanRows, kernels.panel, 0.0f);
  }
}

}  // namespace

void scan_blocks(const Kernels& kernels,
                 const BlockScan& scan,
                 int64_t begin,
                 int64_t end,
                 const ScanScratch& scratch,
                 const BlockStats& stats) {
  const int64_t blocks_per_tile = kMaxTileKeys / scan.keys_per_block;
  const int64_t num_panels = ceil_div(scan.num_rows, kernels.panel);
  load_panels(kernels, scan.queries, scan.num_rows, scan.head_dim, scan.scale, scratch.queries);
  for (int64_t block = begin; block < end; block += blocks_per_tile) {
    const int64_t block_end = min_of(block + blocks_per_tile, end);
    const int64_t first_key = block * scan.keys_per_block;
    const int64_t end_key = min_of(block_end * scan.keys_per_block, scan.seen(scan.num_rows - 1));
    HeadRows keys = scan.keys;
    keys.first = element_at(keys.first, first_key * keys.row_stride, keys.dtype);
    load_rows(kernels, keys, end_key - first_key, scan.head_dim, scratch.keys);
    for (int64_t panel_idx = 0; panel_idx < num_panels; ++panel_idx) {
      scan_panel(kernels, scan, panel_idx, block, block_end, scratch, stats);
    }
  }
}

void hide_blocks(const BlockScan& scan,
                 const BlockStats& stats,
                 int64_t begin,
                 int64_t end,
                 int64_t first_block) {
  for (int64_t n = scan.first_block; n < min_of(first_block, scan.end_block()); ++n) {
    std::fill_n(stats.top + n * kMaxScanRows + begin, end - begin, kMinusInf);
    std::fill_n(stats.sum + n * kMaxScanRows + begin, end - begin, 0.0f);
  }
}

void finish_scan(const Kernels& kernels, const BlockScan& scan, const BlockStats& stats) {
  const int64_t num_blocks = max_of<int64_t>(0, scan.end_block() - scan.first_block);
  for (int64_t row = 0; row < scan.num_rows; row += kernels.panel) {
    const int64_t at = scan.first_block * kMaxScanRows + row;
    kernels.normalize(num_blocks, kMaxScanRows, stats.top + at, stats.sum + at);
  }
}

}  // namespace proxyattn::cpu
