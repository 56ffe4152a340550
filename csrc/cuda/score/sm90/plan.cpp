#include "cuda/score/sm90/plan.h"

#include "common/math.h"
#include "common/sequence.h"
#include "cuda/common/tensor_map.h"
#include "cuda/score/dispatch.h"
#include "cuda/sm90/key_maps.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {
namespace {

// Chunks of at most 2048 keys, and of as few as it takes to give every multiprocessor this many of
// them in a small call. Of very many keys twice as many, since a chunk loads its queries anew: on
// an H100 2 % faster at 1M tokens and up to 2 slower at 128K.
constexpr int64_t kMinChunkShift = kStretchShift;  // log2 of key tiles
constexpr int64_t kMaxChunkShift = 4;
constexpr int64_t kManyKeyTiles = 1024;
constexpr int64_t kChunksPerMultiprocessor = 8;
constexpr int64_t kMultiprocessors = 132;

// A pass takes as many row tiles as keep its cells below this, but at least one. It holds a list's
// peaks of 256K tokens at stride 4 in blocks of 128.
constexpr int64_t kMaxScratchBytes = int64_t{272} << 20;

constexpr int64_t kMaxCount = int64_t{1} << 30;  // kernels count with 32 bits

int64_t floor_div(int64_t numerator, int64_t denominator) {
  return numerator >= 0 ? numerator / denominator : -ceil_div(-numerator, denominator);
}

int64_t floor_log2(int64_t value) {
  int64_t power = 0;
  while (value >> power > 1) ++power;
  return power;
}

}  // namespace

ScorePlan::ScorePlan(const ScoreParams& p)
    : packed_(p.packed.q_starts != nullptr),
      count_(packed_ ? p.batch : 0),
      lists_(packed_ ? p.proxy_heads : p.batch * p.proxy_heads),
      tile_rows_(logit_tile_rows(static_cast<int>(p.head_dim))),
      causal_(p.causal),
      with_mass_(p.mass != nullptr) {
  // Four lanes hold at least one value each of two rows of a tile, as if it had two blocks.
  const int64_t tile_blocks = max_of<int64_t>(2, kLogitKeys * p.stride / p.kv_block);
  tile_block_bytes_ = tile_rows_ * tile_blocks * int64_t{sizeof(float)};
  if (packed_) {
    plan_packed(p);
  } else {
    plan_batch(p);
  }
}

void ScorePlan::plan_batch(const ScoreParams& p) {
  num_keys_ = ceil_div(p.kv_len, p.stride);
  num_queries_ = ceil_div(p.q_len, p.stride);
  const int64_t block_rows = p.q_block / p.stride;
  const int64_t first_row = min_of(num_queries_, p.rows.begin * block_rows);
  const int64_t end_row = min_of(num_queries_, p.rows.end * block_rows);
  span_.first_row = static_cast<int>(first_row);
  span_.num_rows = static_cast<int>(end_row - first_row);
  span_.first_limit = static_cast<int>(floor_div(p.q_offset, p.stride) + 1 + first_row);
  span_.num_keys = static_cast<int>(num_keys_);

  // By all that the sequence has to compute: pieces of a call are worked through alike.
  int64_t tiles = 0;
  for (int64_t row = 0; row < num_queries_; row += tile_rows_) {
    tiles += visible_tiles(min_of(row + tile_rows_, num_queries_) - 1 - first_row);
  }
  chunk_shift_ = choose_chunk_shift(tiles);
  slot_block_bytes_ = tile_block_bytes_ << chunk_shift_;
  const int64_t row_tiles = ceil_div<int64_t>(span_.num_rows, tile_rows_);
  entry_.list_tiles = static_cast<int>(row_tiles);
  max_tiles_ = lists_ * row_tiles;
  if (max_tiles_ == 0) return;
  int64_t list_slots = 0;
  for (int64_t tile = 0; tile < row_tiles; ++tile) list_slots += num_chunks(tile);
  entry_.list_slots = static_cast<int>(list_slots);

  const int64_t whole_tiles = ceil_div((p.rows.end - p.rows.begin) * block_rows, tile_rows_);
  int64_t longest = 0;  // slots of a row tile
  int64_t bound = 0;
  for (int64_t tile = 0; tile < whole_tiles; ++tile) {
    longest = chunks_seen_by((tile + 1) * tile_rows_ - 1);
    bound += lists_ * longest;
  }
  cut(lists_ * list_slots, longest, bound);
}

// By capacities: the device finds out how many slots there are, and passes that come to be without
// any end at once.
void ScorePlan::plan_packed(const ScoreParams& p) {
  const int64_t block_rows = p.q_block / p.stride;
  const int64_t blocks = max_packed_blocks(p.packed, p.batch, p.q_block);
  num_queries_ = blocks * block_rows;
  num_keys_ = SequenceTable::max_units(sequence_params(p, p.stride)) * kWindowUnit;
  const int64_t row_tiles = num_queries_ / tile_rows_ + count_;
  const int64_t key_tiles = ceil_div(ceil_div(p.kv_len, p.stride), int64_t{kLogitKeys});
  chunk_shift_ = choose_chunk_shift(row_tiles * key_tiles / 2);
  slot_block_bytes_ = tile_block_bytes_ << chunk_shift_;
  max_tiles_ = lists_ * row_tiles;
  if (max_tiles_ == 0) return;
  const int64_t longest = max_of<int64_t>(1, ceil_div(key_tiles, int64_t{1} << chunk_shift_));
  cut(max_tiles_ * longest, longest, max_tiles_ * longest);
}

// `slots` are to be computed; `bound` is what the most of them would be for as many query blocks,
// and so decides about scratch.
void ScorePlan::cut(int64_t slots, int64_t longest, int64_t bound) {
  const int64_t pass_bytes = (with_mass_ ? 2 : 1) * slot_block_bytes_;
  const int64_t most = max_of(kMaxScratchBytes / pass_bytes, longest);  // of a pass
  const bool one_pass = bound <= most;
  const int64_t share = one_pass ? bound : most - longest + 1;  // of first slots
  max_slots_ = one_pass ? bound : most;
  max_passes_ = max_of<int64_t>(1, ceil_div(bound, max_of<int64_t>(1, share)));
  num_passes_ = max_of<int64_t>(1, ceil_div(slots, max_of<int64_t>(1, share)));
  pass_slots_ = ceil_div(slots, num_passes_);
}

int64_t ScorePlan::slots_bytes() const {
  return packed_ ? (count_ + 1) * int64_t{sizeof(ScoreSlots)} : 0;
}

int64_t ScorePlan::pass_tiles_bytes() const {
  return packed_ ? (num_passes_ + 1) * int64_t{sizeof(int32_t)} : 0;
}

// Row tiles of all lists whose first slot comes before.
int64_t ScorePlan::tiles_before(int64_t slot) const {
  if (packed_ || entry_.list_tiles == 0) return 0;
  if (slot >= lists_ * entry_.list_slots) return slot == 0 ? 0 : max_tiles_;
  const int64_t list = slot / entry_.list_slots;
  int64_t first = list * entry_.list_slots;
  int64_t tiles = 0;
  for (; tiles < entry_.list_tiles && first < slot; ++tiles) {
    first += num_chunks(entry_.list_tiles - 1 - tiles);
  }
  return list * entry_.list_tiles + tiles;
}

int64_t ScorePlan::num_chunks(int64_t row_tile) const {
  return chunks_seen_by(min_of<int64_t>((row_tile + 1) * tile_rows_, span_.num_rows) - 1);
}

// `row` counts sampled queries from the first of the call.
int64_t ScorePlan::chunks_seen_by(int64_t row) const {
  return ceil_div(visible_tiles(row), int64_t{1} << chunk_shift_);
}

int64_t ScorePlan::visible_tiles(int64_t row) const {
  const int64_t keys = causal_ ? min_of(num_keys_, span_.first_limit + row) : num_keys_;
  return ceil_div(max_of<int64_t>(0, keys), int64_t{kLogitKeys});
}

int64_t ScorePlan::choose_chunk_shift(int64_t tiles) const {
  const int64_t wanted = lists_ * tiles / (kMultiprocessors * kChunksPerMultiprocessor);
  const bool many = ceil_div(num_keys_, int64_t{kLogitKeys}) >= kManyKeyTiles;
  return max_of(kMinChunkShift, min_of(floor_log2(wanted), kMaxChunkShift + (many ? 1 : 0)));
}

bool score_fits(const ScoreParams& p) {
  if (p.kv_block / p.stride < kMinBlockKeys) return false;
  const bool packed = p.packed.q_starts != nullptr;
  const int64_t queries = ceil_div(p.q_len, p.stride);
  const int64_t keys = ceil_div(p.kv_len, p.stride);
  const bool counted =
      keys > 0 && keys <= kMaxCount && queries <= kMaxCount && p.packed.total_q <= kMaxCount &&
      max_total_keys(p.packed, p.batch, p.kv_len) <= kMaxCount &&
      (packed || (-kMaxCount <= p.q_offset && p.q_offset / p.stride <= kMaxCount)) &&
      p.batch * p.proxy_heads <= kMaxCount;
  if (!counted) return false;
  const ScorePlan plan(p);
  const int64_t batch = packed ? 1 : p.batch;
  return tensor_map_fits(p.q_proxy, {plan.num_queries(), p.head_dim, p.proxy_heads, batch},
                         p.q_proxy_strides) &&
         key_maps_fit(p.k_proxy, {plan.num_keys(), p.head_dim, p.key_proxy_heads, batch},
                      p.k_proxy_strides) &&
         plan.max_places() <= kMaxCount && plan.max_tiles() <= kMaxCount &&
         plan.num_passes() * plan.pass_slots() <= kMaxCount &&
         plan.block_bytes() / int64_t{sizeof(float)} <= kMaxCount;
}

int64_t score_workspace_bytes(const ScoreParams& p) {
  return ScorePlan(p).workspace_bytes();
}

}  // namespace proxyattn::cuda::sm90
