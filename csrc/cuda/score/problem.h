// What the score kernels are told: the sampled problem in units of sampled tokens.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "common/math.h"
#include "common/sequence.h"
#include "common/visibility.h"
#include "cuda/sequences/block_runs.h"

namespace proxyattn::cuda {

// Sampled queries of one row tile of the kernels.
inline constexpr int kScoreTileRows = 128;
// Sampled keys of one of their key tiles.
inline constexpr int kScoreTileKeys = 64;

// Keys of a chunk: few enough that a call of one short sequence has work for every SM, many enough
// that the queries' passage through shared memory is small beside it. The bound keeps the subcells
// within the smallest device's shared memory.
inline constexpr int kMinChunkKeys = 512;
inline constexpr int kMaxChunkKeys = 1024;
inline constexpr int kManyKeys = 16384;
// The number of partial sums a row is given up to, in the first pass.
inline constexpr int kMaxLseChunks = 32;

enum class ScorePass { kLse, kCells };

// Depends on the keys alone, so that a row's bits depend neither on the rows asked for nor on other
// sequences.
PROXYATTN_HOST_DEVICE int score_chunk_keys(ScorePass pass, int num_keys) {
  const int cell_keys = num_keys < kManyKeys ? kMinChunkKeys : kMaxChunkKeys;
  if (pass == ScorePass::kCells) return cell_keys;
  return max_of(cell_keys, round_up(ceil_div(num_keys, kMaxLseChunks), kMinChunkKeys));
}

// The sampled queries and keys of a batch entry or of a packed sequence.
struct ScoreSource {
  int64_t first_query;  // row of q_proxy with row 0
  int64_t first_key;    // row of k_proxy with key 0
  int64_t position;     // of row 0
  int64_t first_lse;    // place of row 0 among the rows of lse
  int64_t num_rows;
  int64_t first_q_block;  // of the output
  int64_t num_q_blocks;
  int64_t num_kv_blocks;
  int64_t first_tile;  // row tile
  int num_keys;
  int chunk_keys;  // that a thread block works on at a time, a multiple of block_keys

  PROXYATTN_HOST_DEVICE int num_chunks() const { return ceil_div(num_keys, chunk_keys); }
};

struct ScoreProblem {
  const void* q;
  const void* k;
  float* lse;  // [lists, lse_chunks, lse_rows], base 2, over a row's visible keys in the chunk; the
               // combined sums end in chunk 0
  float* peak;
  float* mass;  // null: not wanted
  TokenStrides q_strides;
  TokenStrides k_strides;
  ScoreSource entry;       // of a batch entry
  QueryRuns packed_tiles;  // of no sequences: a batch
  int64_t lists;           // batch * proxy_heads; of packed sequences: proxy_heads
  int64_t proxy_heads;
  int64_t key_sharers;    // proxies that are scored with one key proxy
  int64_t lse_pitch;      // of one list
  int64_t lse_rows;       // of one chunk
  int64_t num_row_tiles;  // of packed sequences at most so many
  int64_t num_q_blocks;   // of the output
  int64_t num_kv_blocks;
  int stride;
  int block_rows;  // sampled queries of a whole query block
  int block_keys;  // sampled keys of a whole key block
  int chunk_step;  // thread blocks that share the chunks of a row tile
  ScorePass pass;
  float factor;  // scale * log2(e)
  bool causal;
  bool q_aligned;
  bool k_aligned;
  Visibility<int64_t> visibility;  // of tokens

  PROXYATTN_HOST_DEVICE bool is_packed() const { return packed_tiles.table.count > 0; }

  // Of a packed sequence: its query blocks and windows lie where Sequence says.
  PROXYATTN_HOST_DEVICE ScoreSource source(const Sequence& s) const {
    ScoreSource own{};
    own.first_query = int64_t{s.first_q_block} * block_rows;
    own.first_key = s.first_key_unit * kWindowUnit;
    own.position = s.offset;
    own.first_lse = own.first_query;
    own.num_rows = ceil_div(s.q_len, stride);
    own.first_q_block = s.first_q_block;
    own.num_q_blocks = ceil_div<int64_t>(own.num_rows, block_rows);
    own.num_keys = ceil_div(s.kv_len, stride);
    own.num_kv_blocks = ceil_div(own.num_keys, block_keys);
    own.first_tile = packed_tiles.first_run(s);
    own.chunk_keys = score_chunk_keys(pass, own.num_keys);
    return own;
  }
  PROXYATTN_HOST_DEVICE ScoreSource packed_source(int64_t tile) const {
    return source(packed_tiles.owner(static_cast<int32_t>(tile)));
  }

  // Sampled keys [0, visible) that a row sees.
  PROXYATTN_HOST_DEVICE int visible_keys(const ScoreSource& own, int64_t row) const {
    if (row >= own.num_rows) return 0;
    if (!causal) return own.num_keys;
    const int64_t position = own.position + row * stride;
    if (position < 0) return 0;
    return static_cast<int>(min_of<int64_t>(position / stride + 1, own.num_keys));
  }

  // Sampled keys [0, hidden) that a window hides from a row: those of key blocks that it hides from
  // all queries of the row's block. Never falls from one row to the next.
  PROXYATTN_HOST_DEVICE int hidden_keys(const ScoreSource& own, int64_t row) const {
    if (!visibility.has_window()) return 0;
    const int64_t first_row = row / block_rows * block_rows;
    const auto seen =
        visibility.rows(own.position + first_row * stride, int64_t{own.num_keys} * stride).narrow();
    return seen.blocks(block_rows * stride - 1, block_keys * stride).first * block_keys;
  }
};

// The part of a problem that one thread block works on.
struct ScoreWork {
  int64_t list;
  int64_t first_row;  // of the row tile, counted from the source's row 0
  int chunk;
};

// Where in the grid a thread block stands.
struct ScorePlace {
  int64_t list;
  int64_t tile;
  int chunk;

  // Tiles of the latest rows first: with causal masking they have the most to do. Neighbours share
  // a chunk of keys, so that it is read from memory once.
  PROXYATTN_HOST_DEVICE ScorePlace(const ScoreProblem& p, int64_t idx)
      : list(idx / p.num_row_tiles / p.chunk_step),
        tile(p.num_row_tiles - 1 - idx % p.num_row_tiles),
        chunk(static_cast<int>(idx / p.num_row_tiles % p.chunk_step)) {}

  PROXYATTN_HOST_DEVICE ScoreWork work(const ScoreSource& source) const {
    return {list, (tile - source.first_tile) * kScoreTileRows, chunk};
  }
};

// A row tile and a chunk of its keys.
struct ScoreChunk {
  const ScoreProblem& p;
  const ScoreSource& source;
  const ScoreWork& work;

  PROXYATTN_HOST_DEVICE int first_key() const { return work.chunk * source.chunk_keys; }

  // Begin of the key tiles of the chunk with a key that a window leaves to any row of the tile.
  PROXYATTN_HOST_DEVICE int begin_key() const {
    const int hidden = p.hidden_keys(source, work.first_row);
    return max_of(first_key(), hidden / kScoreTileKeys * kScoreTileKeys);
  }

  // End of the keys of the chunk that any row of the tile sees; at most first_key if none does.
  PROXYATTN_HOST_DEVICE int end_key() const {
    const int64_t last_row = min_of(work.first_row + kScoreTileRows, source.num_rows) - 1;
    return min_of(p.visible_keys(source, last_row), first_key() + source.chunk_keys);
  }

  // Keys that every row of the tile sees but for a window. Rows past the end see none.
  PROXYATTN_HOST_DEVICE int unmasked_keys() const {
    return work.first_row + kScoreTileRows > source.num_rows
               ? 0
               : p.visible_keys(source, work.first_row);
  }

  // Keys that a window hides from some row of the tile.
  PROXYATTN_HOST_DEVICE int cut_keys() const {
    return p.hidden_keys(source, work.first_row + kScoreTileRows - 1);
  }

  // Whether a window leaves key block `kv_block` of the chunk to query block `q_block` of the tile.
  PROXYATTN_HOST_DEVICE bool shows(int q_block, int kv_block) const {
    return first_key() + kv_block * p.block_keys >=
           p.hidden_keys(source, work.first_row + q_block * p.block_rows);
  }
};

}  // namespace proxyattn::cuda
