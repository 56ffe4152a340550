// Tile sizes of the sm90 attention kernels.
//
// A team, of which a thread block has one or two, is a scout warp, one or two producer warps and
// two consumer warpgroups of 64 query rows each. With query blocks of 128 rows a team works on one
// block of one head; with blocks of 64 on one block of two heads, whose lists share what they can
// (pairs.cuh). Keys and values pass in tiles of kKeyRows through the team's rings in shared memory;
// a tile is part of a key block, a whole one, or gathered from two of half its rows.
#pragma once

#include <cstdint>

namespace proxyattn::cuda::sm90 {

inline constexpr int kQueryRows = 128;          // of a team
inline constexpr int kWarpgroupRows = 64;       // of a consumer warpgroup: one wgmma high
inline constexpr int kTeamGroups = 2;           // consumer warpgroups of a team
inline constexpr int kConsumerWarps = 8;        // of a team
inline constexpr int64_t kCounterBytes = 4;     // scratch: the number of tiles handed out
inline constexpr int kMaxSharedBytes = 232448;  // a block's limit on compute capability 9.0

// How much of a warpgroup's own products its softmax runs beside.
enum class Overlap {
  kNone,    // one set of probabilities: softmax waits for the output of the tile before
  kOutput,  // two sets: it runs beside that output
};

// Sizes of the blocks that lists name.
enum class BlockSizes {
  kLarge,      // 128 query rows; key blocks of whole key tiles
  kSmall,      // 64 query rows, so that a team works on two heads; key blocks of 64
  kSmallKeys,  // 128 query rows; key blocks of 64, which are less than a key tile
};

inline constexpr int kSmallBlock = 64;

inline constexpr int kMaxPairGroup = 32;  // heads of which a warp finds pairs

struct TileConfig {
  int key_rows;      // keys in one tile
  int query_stages;  // query tiles in shared memory
  int key_stages;    // key tiles in shared memory
  int value_stages;
  Overlap overlap;
  int teams;  // of a thread block
  // Of a thread of the producers' warpgroup and of the consumers; traits.h checks the sum.
  int producer_registers;
  int consumer_registers;
};

constexpr TileConfig tile_config(int head_dim) {
  // 256: 128 accumulators of output leave registers for 64 keys and one set of probabilities; one
  // 64 KB query tile and two stages of 32 KB each for keys and values fill shared memory.
  if (head_dim == 256) return {64, 1, 2, 2, Overlap::kNone, 1, 40, 232};
  // 128: two query tiles, two key and three value stages of 32 KB: the most that fits. A key slot
  // is free when scores are there, early in a step; a value slot when the later warpgroup has ended
  // its step, which is little before the earlier one wants it filled again. So the third stage is
  // the values': with blocks of 64 2 to 6 % (H200, 32K tokens). The second set of probabilities
  // gains 4 to 7 % (H100, 32K to 128K tokens).
  if (head_dim == 128) return {128, 2, 2, 3, Overlap::kOutput, 1, 40, 232};
  // 64: as many exponentials as products take time, so that two warps a scheduler leave both units
  // idle. Small tiles make room for a second team: 4 % at 8K to 16 % at 32K over one with tiles of
  // 128 keys.
  return {64, 2, 4, 4, Overlap::kNone, 2, 32, 112};
}

// Key blocks that a key tile is gathered from.
constexpr int tile_parts(int head_dim, BlockSizes sizes) {
  return sizes == BlockSizes::kLarge ? 1 : tile_config(head_dim).key_rows / kSmallBlock;
}

}  // namespace proxyattn::cuda::sm90
