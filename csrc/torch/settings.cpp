#include "settings.h"

#include <limits>

#include "checks.h"
#include "common/validate.h"

namespace proxyattn::binding {

void apply_settings(const char* op,
                    Settings& settings,
                    const at::Tensor& q,
                    PipelineParams& params) {
  if (settings.shares.has_value()) {
    check_input(op, "shares", *settings.shares, at::kFloat, {params.batch, params.q_heads}, "q", q);
    settings.shares = settings.shares->contiguous();
    params.shares = settings.shares->const_data_ptr<float>();
  }
  params.proxy_heads = settings.num_proxy_heads;
  params.stride = settings.stride;
  params.q_block = settings.block_size;
  params.kv_block = settings.block_size;
  params.min_budget = settings.min_budget;
  params.num_sink_blocks = settings.num_sink_blocks;
  params.num_local_blocks = settings.num_local_blocks;
  params.max_workspace_bytes =
      settings.max_workspace_bytes.value_or(std::numeric_limits<int64_t>::max());
  params.gamma = settings.gamma;
  params.scale = scale_or_default(settings.scale, params.head_dim);
  params.pooling = pooling_of(op, settings.pooling);
  params.budget_mode = budget_mode_of(op, settings.budget_mode);
  params.causal = settings.causal;
  params.window = window_or_all(op, settings.window);
  validate_pipeline(params, op);
}

}  // namespace proxyattn::binding
