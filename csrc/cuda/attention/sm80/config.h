// Tile sizes of the portable attention kernel, and the limits that set them.
//
// A thread block of four warps owns a tile of query rows. Shared memory holds that tile and a ring
// of key and value tiles. Registers hold, per thread, the scores of the warp's rows against one
// key tile and the output sums: rows_per_warp / 16 * (kTileKeys + head_dim) / 2 of the 255 there
// are. So 32 rows a warp are the most at head_dim 128 and 16 at head_dim 256; 32 are wanted, since
// each key or value fragment read from shared memory then feeds two products.
#pragma once

#include <cstdint>

namespace proxyattn::cuda::sm80 {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kTileKeys = 64;
inline constexpr int kSmallTileRows = 64;
inline constexpr int kLargeTileRows = 128;

// Shared memory a block may ask for on the smallest devices, sm_86 and sm_89, in bytes.
inline constexpr int kSmallestSharedLimit = 99 * 1024;
// What the driver keeps of an SM's shared memory for every resident block, in bytes.
inline constexpr int kReservedSharedBytes = 1024;

constexpr bool has_large_tile(int head_dim) {
  return head_dim <= 128;
}

// Slots of the key/value ring. Three let a copy run during two products; two keep two small
// blocks on an SM with 100 KiB, and the one head_dim 256 tile that fits there.
constexpr int num_slots(int tile_rows) {
  return tile_rows == kLargeTileRows ? 3 : 2;
}

// Room behind the tiles for what the thread block works on.
inline constexpr int kBlockWorkBytes = 64;

constexpr int shared_bytes(int head_dim, int tile_rows) {
  constexpr int kElementBytes = 2;
  const int tile_bytes = (tile_rows + num_slots(tile_rows) * kTileKeys) * head_dim * kElementBytes;
  return tile_bytes + kBlockWorkBytes;
}

// Resident blocks that the register allocator must leave room for: 65,536 registers over 128
// threads a block are 255, 168 or 128 a thread for 2, 3 or 4 blocks. Without spills about 65
// registers are needed besides the accumulators.
constexpr int blocks_per_sm(int head_dim, int tile_rows) {
  const int accumulators = tile_rows / kWarps / 16 * (kTileKeys + head_dim) / 2;
  return accumulators <= 64 ? 4 : accumulators <= 96 ? 3 : 2;
}

static_assert(shared_bytes(64, kLargeTileRows) <= kSmallestSharedLimit);
static_assert(shared_bytes(128, kLargeTileRows) <= kSmallestSharedLimit);
static_assert(shared_bytes(64, kSmallTileRows) <= kSmallestSharedLimit);
static_assert(shared_bytes(128, kSmallTileRows) <= kSmallestSharedLimit);
static_assert(shared_bytes(256, kSmallTileRows) <= kSmallestSharedLimit);

}  // namespace proxyattn::cuda::sm80
