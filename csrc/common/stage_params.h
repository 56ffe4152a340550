// What each stage of proxy_attention and choose_blocks is told, of a batch and of packed sequences
// alike.
//
// A call is worked through in parts, ranges of its query blocks. A part is a call of its own: with
// its queries alone, whose blocks are numbered from the first, and all keys.
#pragma once

#include <cstdint>

#include "proxyattn/attention.h"
#include "proxyattn/needs.h"
#include "proxyattn/pipeline.h"
#include "proxyattn/pool.h"
#include "proxyattn/score.h"
#include "proxyattn/select.h"

#include "common/math.h"
#include "common/sequence.h"

namespace proxyattn {

// How many things a call has, of which packed sequences are numbered together.
class CallSizes {
 public:
  explicit CallSizes(const PipelineParams& call) : p_(call) {}

  bool is_packed() const { return p_.packed.q_starts != nullptr; }
  // Batch entries that lists, scores and proxies have; packed sequences share one.
  int64_t entries() const { return is_packed() ? 1 : p_.batch; }
  // Query blocks of an entry.
  int64_t q_blocks() const {
    return is_packed() ? max_packed_blocks(p_.packed, p_.batch, p_.q_block)
                       : ceil_div(p_.q_len, p_.q_block);
  }
  // Key blocks of a list.
  int64_t kv_blocks() const { return ceil_div(p_.kv_len, p_.kv_block); }
  int64_t block_windows() const { return p_.q_block / p_.stride; }
  // Windows of queries and of keys of an entry.
  int64_t q_windows() const {
    return is_packed() ? q_blocks() * block_windows() : ceil_div(p_.q_len, p_.stride);
  }
  int64_t kv_windows() const {
    return is_packed() ? SequenceTable::max_units(sequence_params(p_, p_.stride)) * kWindowUnit
                       : ceil_div(p_.kv_len, p_.stride);
  }
  int64_t key_proxy_heads() const { return min_of(p_.proxy_heads, p_.kv_heads); }
  // (list, query block, key block)
  int64_t cells() const { return entries() * p_.proxy_heads * q_blocks() * kv_blocks(); }
  int64_t counts() const { return entries() * p_.q_heads * q_blocks(); }

 private:
  const PipelineParams& p_;
};

// What the stages hand on. Null: the call does not need it.
struct StageBuffers {
  void* q_proxy;     // [entries, q_windows, proxy_heads, head_dim]
  void* k_proxy;     // [entries, kv_windows, key_proxy_heads, head_dim]
  void* needs;       // [batch, q_heads], budgets or shares
  float* peak;       // [entries, proxy_heads, q_blocks, kv_blocks]
  float* mass;       // the same; top-p
  int32_t* indices;  // the same; where lists are not the result
  int32_t* counts;   // [entries, q_heads, q_blocks]
  void* table;       // of packed sequences
  void* scratch;     // of whatever stage runs
  int64_t scratch_bytes;
};

// Query blocks [begin, end) of a call.
PipelineParams part_of(const PipelineParams& call, const BlockRange& blocks);

SequenceParams table_params(const PipelineParams& part, const StageBuffers& buffers);
// The keys' proxies are the same for all parts.
PoolParams pool_params(const PipelineParams& part, const StageBuffers& buffers, bool with_keys);
// Of a whole call: heads are judged by a sequence's last queries.
NeedParams need_params(const PipelineParams& call, const StageBuffers& buffers);
ScoreParams score_params(const PipelineParams& part, const StageBuffers& buffers);
SelectParams select_params(const PipelineParams& part, const StageBuffers& buffers);
// Without lists among the buffers: over all visible blocks.
AttentionParams attention_params(const PipelineParams& part, const StageBuffers& buffers);

}  // namespace proxyattn
