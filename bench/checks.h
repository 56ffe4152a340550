// Compares what a stage left on a machine with the CPU kernels, at sampled rows and heads of the
// first and the last batch entry, so that a check of 1M tokens takes seconds. All throw
// WrongResult. Params are those of the launch; their pointers belong to the machine.
#pragma once

#include "harness.h"

namespace proxyattn::bench {

void check_pool(Machine& machine, const PoolParams& params);
void check_score(Machine& machine, const ScoreParams& params);
void check_needs(Machine& machine, const NeedParams& params);
void check_select(Machine& machine, const SelectParams& params);
void check_attention(Machine& machine, const AttentionParams& params);

}  // namespace proxyattn::bench
