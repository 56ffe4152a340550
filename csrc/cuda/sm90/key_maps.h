// How key tiles are laid in shared memory: transposed, so that a thread's logits are of few blocks.
//
// Of every eight columns of a product a thread holds two, those of its lane in its quad. With keys
// in order the 32 logits of a row would be of all key blocks of the tile, and four lanes would have
// to merge theirs. So eight neighbouring columns are keys that stand a run of 16 apart:
//
//   column 8 * j + p of a tile is key 16 * p + j
//
// and lane q of a quad holds keys [32 * q, 32 * q + 32) of the tile, runs 2 * q and 2 * q + 1.
//
// The copy engine does that: to its map, runs and the keys of a run are two dimensions. But it
// can't clip them at the last key, nor are keys of different pages runs of one dimension. So a last
// tile that is not whole comes in order, through a map of its own, as do all tiles in pages, and
// gather_lane_keys() makes the one of the other.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "cuda/common/tensor_map.h"
#include "cuda/sm90/key_loads.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {

struct KeyMaps {
  CUtensorMap whole;  // [batch, heads, 16, runs, head_dim], 16 x 8 x 64
  // [batch, heads, head_dim / 64, keys, 64], 128 keys; of pages [pages, heads, head_dim / 64, keys
  // of a page, 64], a piece of PageLoads by 64.
  CUtensorMap in_order;
  int num_whole;  // tiles of the tensor
};

// Whether the copy engine can address the keys in both ways.
inline bool key_maps_fit(const void* data, const TensorSizes& sizes, const TokenStrides& strides) {
  return tensor_map_fits(data, sizes, strides) &&
         tensor_map_fits(data, sizes, {strides.batch, kRunKeys * strides.token, strides.head});
}

// Tiles may begin at the first `starts` tokens of a run.
inline KeyMaps make_key_maps(const char* op,
                             const void* data,
                             DType dtype,
                             const TensorSizes& sizes,
                             const TokenStrides& strides,
                             int starts = 1) {
  KeyMaps maps;
  maps.num_whole = static_cast<int>(sizes.tokens / kLogitKeys);
  maps.whole = make_run_map(op, data, dtype, sizes, strides, {kRunKeys, kTileRuns, starts});
  maps.in_order =
      make_tensor_map(op, data, dtype, sizes, strides,
                      {kLogitKeys, static_cast<int>(sizes.head_dim) / kTensorBoxColumns});
  return maps;
}

inline KeyMaps make_page_maps(const char* op,
                              const void* data,
                              DType dtype,
                              const TensorSizes& sizes,
                              const TokenStrides& strides,
                              const PageLoads& loads) {
  KeyMaps maps;
  maps.num_whole = 0;
  maps.in_order = make_tensor_map(op, data, dtype, sizes, strides, {loads.piece_keys(), 1});
  maps.whole = maps.in_order;  // unused, but a valid map, as kernels prefetch it
  return maps;
}

}  // namespace proxyattn::cuda::sm90
