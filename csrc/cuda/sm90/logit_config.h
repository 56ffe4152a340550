// Tile sizes of the sm90 kernels that want logits themselves: scoring and what each head needs.
//
// A thread block owns a row tile of 64 rows, one wgmma high, for each of its consumer warpgroups.
// Keys pass in tiles of 128 through a ring in shared memory; every key tile meets every row.
#pragma once

namespace proxyattn::cuda::sm90 {

inline constexpr int kGroupRows = 64;   // of a consumer warpgroup
inline constexpr int kLogitKeys = 128;  // keys of a tile
// Key tiles that a row's exponentials are added up over with one reference. Stretches begin at
// multiples of their length, whatever work a thread block is given: bits depend neither on the
// batch nor on the machine nor on where a prompt was cut. Shorter ones cost a long prompt more
// sums, longer ones a short prompt the work to share out.
inline constexpr int kStretchShift = 3;
inline constexpr int kStretchTiles = 1 << kStretchShift;
// A key block must hold at least this many: those that a lane holds together, see key_maps.h.
inline constexpr int kMinBlockKeys = 16;

struct LogitConfig {
  int groups;  // consumer warpgroups of a thread block
  int query_stages;
  int key_stages;
  // Of a thread of the producer's warpgroup and of the consumers; logit_traits.h checks the sum.
  int producer_registers;
  int consumer_registers;
};

constexpr LogitConfig logit_config(int head_dim) {
  // 256: a key tile is 64 KB, so two of them and 128 rows of queries are what fits.
  if (head_dim == 256) return {2, 1, 2, 56, 224};
  // Four warpgroups, each with one product at a time: while one waits for the tensor cores, three
  // others have maxima and exponentials to compute.
  // 128: two row tiles of 64 KB, three key tiles of 32 KB.
  if (head_dim == 128) return {4, 2, 3, 32, 112};
  return {4, 2, 6, 32, 112};
}

// Rows of a row tile: what the host needs to know to count them.
constexpr int logit_tile_rows(int head_dim) {
  return logit_config(head_dim).groups * kGroupRows;
}

}  // namespace proxyattn::cuda::sm90
