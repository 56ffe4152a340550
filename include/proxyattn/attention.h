// Stage 5, block_sparse_attention: exact attention of every query over its chosen key blocks.
#pragma once

#include <cstdint>

#include "proxyattn/sequences.h"
#include "proxyattn/types.h"

namespace proxyattn {

struct AttentionParams {
  int64_t batch;
  int64_t q_len;
  int64_t kv_len;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t list_heads;     // lists per batch entry; q_heads / list_heads heads share one
  int64_t list_capacity;  // entries that a list has room for
  int64_t q_block;
  int64_t kv_block;
  int64_t q_offset;      // position of query 0
  int64_t window;        // keys that a query sees, its own the last; 0: all up to its own
  BlockRange rows;       // query blocks to attend; the others' outputs stay untouched
  BlockRange list_rows;  // query blocks that indices and counts hold; includes `rows`
  int64_t lse_pitch;     // queries that lse holds of a head: q_len, or all packed ones

  TokenStrides q_strides;
  TokenStrides k_strides;
  TokenStrides v_strides;
  TokenStrides out_strides;

  const void* q;             // [batch, q_len, q_heads, head_dim]
  const void* k;             // [batch, kv_len, kv_heads, head_dim]
  const void* v;             // [batch, kv_len, kv_heads, head_dim]
  const int32_t* indices;    // [batch, list_heads, list_rows, list_capacity]; null: all visible
  const int32_t* counts;     // [batch, q_heads, list_rows]; null if and only if indices is
  const float* sink_logits;  // [q_heads], of a column without a value in each row; null: none
  void* out;                 // [batch, q_len, q_heads, head_dim]
  float* lse;                // [batch, q_heads, lse_pitch], natural log; null: not wanted
  void* workspace;           // block_sparse_attention_workspace_bytes(params); null when that is 0
  PackedSequences packed;    // without q_starts: a batch

  int64_t workspace_bytes;
  float scale;
  bool causal;
  // Each list names the blocks that are visible, each once: a head that reads as many as there are
  // may do so in any order.
  bool lists_are_rankings;
  DType dtype;
};

// Entries outside [0, ceil(kv_len / kv_block)) are never followed to memory: the CPU raises
// InvalidArgument, the GPU, which can't ask without a synchronisation, reads them as empty blocks.
namespace cpu {
int64_t block_sparse_attention_workspace_bytes(const AttentionParams& params);
void block_sparse_attention(const AttentionParams& params);
}  // namespace cpu
namespace cuda {
int64_t block_sparse_attention_workspace_bytes(const AttentionParams& params);
void block_sparse_attention(const AttentionParams& params, Stream stream);
}  // namespace cuda

}  // namespace proxyattn
