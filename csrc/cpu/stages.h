// Stages as their ops and the chain of all of them run them: parameters have been validated, and
// queries may outnumber keys, since packed sequences come one by one.
#pragma once

#include "proxyattn/attention.h"
#include "proxyattn/needs.h"
#include "proxyattn/score.h"
#include "proxyattn/select.h"

namespace proxyattn::cpu {

void run_score(const ScoreParams& params);
void run_needs(const NeedParams& params);
void run_select(const SelectParams& params);
void run_attention(const AttentionParams& params);

}  // namespace proxyattn::cpu
