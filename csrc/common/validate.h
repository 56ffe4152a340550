// Every rule about a stage's arguments that both devices share, each written once.
// All throw InvalidArgument; `op` is the name that the message begins with.
#pragma once

#include "proxyattn/attention.h"
#include "proxyattn/needs.h"
#include "proxyattn/pipeline.h"
#include "proxyattn/pool.h"
#include "proxyattn/score.h"
#include "proxyattn/select.h"

namespace proxyattn {

void validate_pool(const PoolParams& params, const char* op = "pool_heads");
void validate_score(const ScoreParams& params, const char* op = "score_blocks");
void validate_needs(const NeedParams& params);
const char* needs_op(const NeedParams& params);  // the op that estimates what these ask for
void validate_select(const SelectParams& params, const char* op = "select_blocks");
void validate_attention(const AttentionParams& params, const char* op = "block_sparse_attention");
const char* attention_op(const AttentionParams& params);  // the op that these are for
void validate_pipeline(const PipelineParams& params, const char* op = "proxy_attention");

// Queries of a batch are aligned with the last keys, and must not outnumber them where each sees
// the keys up to its own. Those of packed sequences may.
void validate_aligned_lengths(const char* op, int64_t q_len, int64_t kv_len, bool causal);
template <typename Params>
void validate_alignment(const char* op, const Params& p) {
  if (p.packed.q_starts != nullptr) return;
  validate_aligned_lengths(op, p.q_len, p.kv_len, p.causal);
}

// Of the stages before attention: on a GPU they take packed sequences by the table that
// prepare_sequences has made, on a CPU not at all.
void validate_prepared(const char* op, const PackedSequences& packed);
void validate_not_packed(const char* op, const PackedSequences& packed);

// Where the keys of packed sequences are; a part of what is held to be right of such a call, for
// who has to know it earlier.
void validate_key_places(const PackedSequences& packed, const char* op);

// A call with a workspace that is too small would write out of bounds.
void validate_workspace(const char* op, const void* workspace, int64_t got, int64_t needed);

}  // namespace proxyattn
