// Every schema of torch.ops.proxyattn, and what they dispatch to.
#include <c10/core/AutogradState.h>
#include <torch/library.h>

#include "ops.h"

namespace proxyattn::binding {
namespace {

constexpr uint64_t kForwardLevel = 0;  // the only one that torch has

// There is no derivative of either mode: an input that would need one is refused, everything else
// passes through.
void refuse_derivatives(const c10::OperatorHandle& op,
                        c10::DispatchKeySet keys,
                        torch::jit::Stack* stack) {
  const c10::AutogradState& state = c10::AutogradState::get_tls_state();
  const auto& arguments = op.schema().arguments();
  const auto name = op.schema().operator_name().name.substr(sizeof("proxyattn::") - 1);
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
    if (!value.isTensor()) continue;
    const at::Tensor& tensor = value.toTensor();
    TORCH_CHECK(!state.get_grad_mode() || !tensor.requires_grad(), name, ": ", arguments[i].name(),
                " must not require grad, there is no backward; call it under torch.no_grad() or "
                "detach the tensor");
    TORCH_CHECK(!state.get_fw_grad_mode() || !tensor._fw_grad(kForwardLevel).defined(), name, ": ",
                arguments[i].name(),
                " must not carry a tangent, there is no forward-mode derivative; detach the "
                "tensor");
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

// A tensor that an op writes to is another one afterwards, for whoever keeps it for a backward.
void count_writes(const c10::OperatorHandle& op,
                  c10::DispatchKeySet keys,
                  torch::jit::Stack* stack) {
  const std::size_t num_arguments = op.schema().arguments().size();
  for (std::size_t i = 0; i < num_arguments; ++i) {
    const c10::AliasInfo* alias = op.schema().arguments()[i].alias_info();
    const c10::IValue& value = torch::jit::peek(*stack, i, num_arguments);
    if (alias == nullptr || !alias->isWrite() || !value.isTensor()) continue;
    const at::Tensor& tensor = value.toTensor();
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

constexpr const char* kOps[] = {
    "pool_heads",           "score_blocks",          "estimate_budgets",
    "estimate_shares",      "select_blocks",         "block_sparse_attention",
    "choose_blocks",        "proxy_attention",       "block_sparse_attention_varlen",
    "choose_blocks_varlen", "proxy_attention_varlen"};
constexpr const char* kWritingOps[] = {"block_sparse_attention_varlen", "proxy_attention_varlen"};

// One binding serves both devices: it asks backend_of() for the core functions.
void register_kernels(torch::Library& library) {
  library.impl("pool_heads", pool_heads);
  library.impl("score_blocks", score_blocks);
  library.impl("estimate_budgets", estimate_budgets);
  library.impl("estimate_shares", estimate_shares);
  library.impl("select_blocks", select_blocks);
  library.impl("_check_block_lists", check_block_lists);
  library.impl("_check_sequences", check_sequences);
  library.impl("block_sparse_attention", block_sparse_attention);
  library.impl("choose_blocks", choose_blocks);
  library.impl("proxy_attention", proxy_attention);
  library.impl("block_sparse_attention_varlen", block_sparse_attention_varlen);
  library.impl("choose_blocks_varlen", choose_blocks_varlen);
  library.impl("proxy_attention_varlen", proxy_attention_varlen);
}

}  // namespace

// Windows and sinks came later than the rest and may be left out, as earlier callers do.
TORCH_LIBRARY(proxyattn, library) {
  library.def(
      "pool_heads(Tensor q, Tensor k, int num_proxy_heads, int stride, str pooling) "
      "-> (Tensor q_proxy, Tensor k_proxy)");
  library.def(
      "score_blocks(Tensor q_proxy, Tensor k_proxy, SymInt q_len, SymInt kv_len, int stride, "
      "int block_size, bool causal, float? scale, bool with_mass, int? window=None) "
      "-> (Tensor peak, Tensor mass)");
  library.def(
      "estimate_budgets(Tensor q, Tensor k, float gamma, int block_size, bool causal, "
      "float? scale, int? window=None) -> Tensor budgets");
  library.def(
      "estimate_shares(Tensor q, Tensor k, int block_size, bool causal, float? scale, "
      "int num_sink_blocks, int num_local_blocks, int? window=None) -> Tensor shares");
  library.def(
      "select_blocks(Tensor peak, Tensor? mass, Tensor needs, SymInt q_len, SymInt kv_len, "
      "int num_heads, int block_size, bool causal, str budget_mode, float gamma, int min_budget, "
      "int num_sink_blocks, int num_local_blocks, int? window=None) "
      "-> (Tensor indices, Tensor counts)");
  library.def(
      "_check_block_lists(Tensor indices, Tensor counts, int kv_len, int block_size) -> ()");
  library.def(
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, "
      "int block_size, bool causal, float? scale, bool return_lse, int? window=None, "
      "Tensor? sink_logits=None) -> (Tensor out, Tensor lse)");
  library.def(
      "choose_blocks(Tensor q, Tensor k, bool causal, float? scale, float gamma, int stride, "
      "str pooling, int block_size, int num_proxy_heads, str budget_mode, int min_budget, "
      "int num_sink_blocks, int num_local_blocks, Tensor? shares, int? max_workspace_bytes, "
      "int? window=None) -> (Tensor indices, Tensor counts)");
  library.def(
      "proxy_attention(Tensor q, Tensor k, Tensor v, bool causal, float? scale, float gamma, "
      "int stride, str pooling, int block_size, int num_proxy_heads, str budget_mode, "
      "int min_budget, int num_sink_blocks, int num_local_blocks, Tensor? shares, "
      "bool return_lse, int? max_workspace_bytes, int? window=None, Tensor? sink_logits=None) "
      "-> (Tensor out, Tensor lse)");
  library.def(
      "_check_sequences(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
      "int max_seqlen_q, int max_seqlen_k, Tensor? block_table, Tensor? seqused_k) -> ()");
  // `out`, if given, is written, and the first result is then an unused one: what an op returns
  // must not be one of its arguments.
  library.def(
      "block_sparse_attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
      "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor indices, "
      "Tensor counts, Tensor? block_table, Tensor? seqused_k, int block_size, bool causal, "
      "float? scale, bool return_lse, Tensor(a!)? out, int? window=None, Tensor? sink_logits=None) "
      "-> (Tensor out, Tensor lse)");
  library.def(
      "choose_blocks_varlen(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? block_table, Tensor? seqused_k, "
      "bool causal, float? scale, float gamma, int stride, str pooling, int block_size, "
      "int num_proxy_heads, str budget_mode, int min_budget, int num_sink_blocks, "
      "int num_local_blocks, Tensor? shares, int? max_workspace_bytes, int? window=None) "
      "-> (Tensor indices, Tensor counts)");
  library.def(
      "proxy_attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
      "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? block_table, "
      "Tensor? seqused_k, bool causal, float? scale, float gamma, int stride, str pooling, "
      "int block_size, int num_proxy_heads, str budget_mode, int min_budget, int num_sink_blocks, "
      "int num_local_blocks, Tensor? shares, bool return_lse, int? max_workspace_bytes, "
      "Tensor(a!)? out, int? window=None, Tensor? sink_logits=None) -> (Tensor out, Tensor lse)");
}

TORCH_LIBRARY_IMPL(proxyattn, CPU, library) {
  register_kernels(library);
}
TORCH_LIBRARY_IMPL(proxyattn, CUDA, library) {
  register_kernels(library);
}

TORCH_LIBRARY_IMPL(proxyattn, ADInplaceOrView, library) {
  for (const char* op : kWritingOps) {
    library.impl(op, torch::CppFunction::makeFromBoxedFunction<&count_writes>());
  }
}

TORCH_LIBRARY_IMPL(proxyattn, Autograd, library) {
  for (const char* op : kOps) {
    library.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_derivatives>());
  }
}

}  // namespace proxyattn::binding
