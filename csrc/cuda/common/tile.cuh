// Tiles of [rows x kColumns] 16-bit elements in shared memory, and their loader.
//
// A row is kColumns / 8 chunks of 16 bytes; chunk c of row r lies at chunk c ^ (r % 8) of that row.
// Any eight rows of one column of chunks then fall into different banks, which is what ldmatrix
// reads at once, and so do the chunks of one row, which is what the loader writes.
//
// Loading is collective: thread t of kThreads copies chunk t % kChunks of every kRowsPerPass-th
// row. Rows at or past `valid_rows` are filled with zeros and not read. With aligned rows the
// copies are asynchronous: commit, wait and a barrier make them visible. Unaligned rows are read
// element by element and stored at once; the same barrier serves them.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/cp_async.cuh"

namespace proxyattn::cuda {

template <int kColumns>
struct SharedTile {
  static_assert(kColumns % 64 == 0, "the swizzle permutes groups of eight chunks");
  static constexpr int kChunks = kColumns / kChunkElements;
  static constexpr int kRowBytes = kColumns * 2;

  static constexpr int bytes(int rows) { return rows * kRowBytes; }

  // Byte offset of a chunk from the start of the tile.
  static PROXYATTN_DEVICE uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes));
  }

  // The address of chunk 0 or 1 of a row, moved down by a multiple of 8 rows and right by a
  // multiple of 16 columns. The tile lies at a multiple of kRowBytes.
  static PROXYATTN_DEVICE uint32_t moved(uint32_t address, int rows, int columns) {
    return (address ^ static_cast<uint32_t>(columns * 2)) + static_cast<uint32_t>(rows * kRowBytes);
  }
};

// True when every row of a tensor with this base and these strides starts at a multiple of 16
// bytes.
template <typename... Strides>
__host__ __device__ inline bool rows_are_aligned(const void* base, Strides... strides) {
  return reinterpret_cast<uintptr_t>(base) % kChunkBytes == 0 &&
         ((strides % kChunkElements == 0) && ...);
}

template <int kRows, int kColumns, int kThreads>
struct TileLoader {
  using Tile = SharedTile<kColumns>;
  // For so many rows of the tile, a multiple of eight.
  template <int kPartRows>
  using Part = TileLoader<kPartRows, kColumns, kThreads>;
  static constexpr int kTileRows = kRows;
  static constexpr int kRowsPerPass = kThreads / Tile::kChunks;
  static constexpr int kPasses = kRows / kRowsPerPass;
  static_assert(kThreads % Tile::kChunks == 0 && kRows % kRowsPerPass == 0);

  // `source` is the first row in global memory, `row_stride` counts elements.
  template <typename Element>
  static PROXYATTN_DEVICE void load(uint32_t tile,
                                    const Element* source,
                                    int64_t row_stride,
                                    int valid_rows,
                                    bool aligned,
                                    int thread) {
    const int chunk = thread % Tile::kChunks;
    const int first_row = thread / Tile::kChunks;
    source += first_row * row_stride + chunk * kChunkElements;
    if (aligned) {
      PROXYATTN_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        const int row = first_row + pass * kRowsPerPass;
        ptx::cp_async_16(tile + Tile::offset(row, chunk), source, row < valid_rows);
        source += kRowsPerPass * row_stride;
      }
    } else {
      PROXYATTN_NO_UNROLL
      for (int row = first_row; row < kRows; row += kRowsPerPass) {
        const uint4 value = row < valid_rows ? gather_chunk(source) : uint4{0, 0, 0, 0};
        ptx::store_shared_16(tile + Tile::offset(row, chunk), value);
        source += kRowsPerPass * row_stride;
      }
    }
  }
};

}  // namespace proxyattn::cuda
