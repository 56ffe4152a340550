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
void validate_pipeline(const PipelineParams& params, const char* op = "proxy_attention");

// A call with a workspace that is too small would write out of bounds.
void validate_workspace(const char* op, const void* workspace, int64_t got, int64_t needed);

}  // namespace proxyattn
