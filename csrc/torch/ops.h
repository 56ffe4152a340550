// The ops, as library.cpp registers them.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace proxyattn::binding {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

TensorPair pool_heads(const at::Tensor& q,
                      const at::Tensor& k,
                      int64_t num_proxy_heads,
                      int64_t stride,
                      std::string_view pooling);

TensorPair score_blocks(const at::Tensor& q_proxy,
                        const at::Tensor& k_proxy,
                        int64_t q_len,
                        int64_t kv_len,
                        int64_t stride,
                        int64_t block_size,
                        bool causal,
                        std::optional<double> scale,
                        bool with_mass,
                        std::optional<int64_t> window);

at::Tensor estimate_budgets(const at::Tensor& q,
                            const at::Tensor& k,
                            double gamma,
                            int64_t block_size,
                            bool causal,
                            std::optional<double> scale,
                            std::optional<int64_t> window);

at::Tensor estimate_shares(const at::Tensor& q,
                           const at::Tensor& k,
                           int64_t block_size,
                           bool causal,
                           std::optional<double> scale,
                           int64_t num_sink_blocks,
                           int64_t num_local_blocks,
                           std::optional<int64_t> window);

TensorPair select_blocks(const at::Tensor& peak,
                         const std::optional<at::Tensor>& mass,
                         const at::Tensor& needs,
                         int64_t q_len,
                         int64_t kv_len,
                         int64_t num_heads,
                         int64_t block_size,
                         bool causal,
                         std::string_view budget_mode,
                         double gamma,
                         int64_t min_budget,
                         int64_t num_sink_blocks,
                         int64_t num_local_blocks,
                         std::optional<int64_t> window);

// What PROXYATTN_CHECK asks every call of block_sparse_attention for, see device_checks.h.
void check_block_lists(const at::Tensor& indices,
                       const at::Tensor& counts,
                       int64_t kv_len,
                       int64_t block_size);

TensorPair block_sparse_attention(const at::Tensor& q,
                                  const at::Tensor& k,
                                  const at::Tensor& v,
                                  const at::Tensor& indices,
                                  const at::Tensor& counts,
                                  int64_t block_size,
                                  bool causal,
                                  std::optional<double> scale,
                                  bool return_lse,
                                  std::optional<int64_t> window,
                                  const std::optional<at::Tensor>& sink_logits);

TensorPair choose_blocks(const at::Tensor& q,
                         const at::Tensor& k,
                         bool causal,
                         std::optional<double> scale,
                         double gamma,
                         int64_t stride,
                         std::string_view pooling,
                         int64_t block_size,
                         int64_t num_proxy_heads,
                         std::string_view budget_mode,
                         int64_t min_budget,
                         int64_t num_sink_blocks,
                         int64_t num_local_blocks,
                         const std::optional<at::Tensor>& shares,
                         std::optional<int64_t> max_workspace_bytes,
                         std::optional<int64_t> window);

TensorPair proxy_attention(const at::Tensor& q,
                           const at::Tensor& k,
                           const at::Tensor& v,
                           bool causal,
                           std::optional<double> scale,
                           double gamma,
                           int64_t stride,
                           std::string_view pooling,
                           int64_t block_size,
                           int64_t num_proxy_heads,
                           std::string_view budget_mode,
                           int64_t min_budget,
                           int64_t num_sink_blocks,
                           int64_t num_local_blocks,
                           const std::optional<at::Tensor>& shares,
                           bool return_lse,
                           std::optional<int64_t> max_workspace_bytes,
                           std::optional<int64_t> window,
                           const std::optional<at::Tensor>& sink_logits);

// What PROXYATTN_CHECK asks the calls below for, see device_checks.h.
void check_sequences(const at::Tensor& q,
                     const at::Tensor& k,
                     const at::Tensor& cu_seqlens_q,
                     const std::optional<at::Tensor>& cu_seqlens_k,
                     int64_t max_seqlen_q,
                     int64_t max_seqlen_k,
                     const std::optional<at::Tensor>& block_table,
                     const std::optional<at::Tensor>& seqused_k);

TensorPair block_sparse_attention_varlen(const at::Tensor& q,
                                         const at::Tensor& k,
                                         const at::Tensor& v,
                                         const at::Tensor& cu_seqlens_q,
                                         const std::optional<at::Tensor>& cu_seqlens_k,
                                         int64_t max_seqlen_q,
                                         int64_t max_seqlen_k,
                                         const at::Tensor& indices,
                                         const at::Tensor& counts,
                                         const std::optional<at::Tensor>& block_table,
                                         const std::optional<at::Tensor>& seqused_k,
                                         int64_t block_size,
                                         bool causal,
                                         std::optional<double> scale,
                                         bool return_lse,
                                         const std::optional<at::Tensor>& out,
                                         std::optional<int64_t> window,
                                         const std::optional<at::Tensor>& sink_logits);

TensorPair choose_blocks_varlen(const at::Tensor& q,
                                const at::Tensor& k,
                                const at::Tensor& cu_seqlens_q,
                                const std::optional<at::Tensor>& cu_seqlens_k,
                                int64_t max_seqlen_q,
                                int64_t max_seqlen_k,
                                const std::optional<at::Tensor>& block_table,
                                const std::optional<at::Tensor>& seqused_k,
                                bool causal,
                                std::optional<double> scale,
                                double gamma,
                                int64_t stride,
                                std::string_view pooling,
                                int64_t block_size,
                                int64_t num_proxy_heads,
                                std::string_view budget_mode,
                                int64_t min_budget,
                                int64_t num_sink_blocks,
                                int64_t num_local_blocks,
                                const std::optional<at::Tensor>& shares,
                                std::optional<int64_t> max_workspace_bytes,
                                std::optional<int64_t> window);

TensorPair proxy_attention_varlen(const at::Tensor& q,
                                  const at::Tensor& k,
                                  const at::Tensor& v,
                                  const at::Tensor& cu_seqlens_q,
                                  const std::optional<at::Tensor>& cu_seqlens_k,
                                  int64_t max_seqlen_q,
                                  int64_t max_seqlen_k,
                                  const std::optional<at::Tensor>& block_table,
                                  const std::optional<at::Tensor>& seqused_k,
                                  bool causal,
                                  std::optional<double> scale,
                                  double gamma,
                                  int64_t stride,
                                  std::string_view pooling,
                                  int64_t block_size,
                                  int64_t num_proxy_heads,
                                  std::string_view budget_mode,
                                  int64_t min_budget,
                                  int64_t num_sink_blocks,
                                  int64_t num_local_blocks,
                                  const std::optional<at::Tensor>& shares,
                                  bool return_lse,
                                  std::optional<int64_t> max_workspace_bytes,
                                  const std::optional<at::Tensor>& out,
                                  std::optional<int64_t> window,
                                  const std::optional<at::Tensor>& sink_logits);

}  // namespace proxyattn::binding
