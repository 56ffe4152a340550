// How the blocks of a prompt are chosen: the arguments that all ops of the whole chain share.
#pragma once

#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>

#include "proxyattn/pipeline.h"

namespace proxyattn::binding {

struct Settings {
  bool causal;
  std::optional<double> scale;
  double gamma;
  int64_t stride;
  std::string_view pooling;
  int64_t block_size;
  int64_t num_proxy_heads;
  std::string_view budget_mode;
  int64_t min_budget;
  int64_t num_sink_blocks;
  int64_t num_local_blocks;
  std::optional<at::Tensor> shares;
  std::optional<int64_t> max_workspace_bytes;
  std::optional<int64_t> window;
};

// Checks them and fills them in, given params that hold everything about q and k. The params point
// to settings.shares, made contiguous, from then on.
void apply_settings(const char* op,
                    Settings& settings,
                    const at::Tensor& q,
                    PipelineParams& params);

}  // namespace proxyattn::binding
