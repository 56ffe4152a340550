"""The backend on GPUs: FlashAttention's, or Triton's, with long rows sparse."""

from proxyattn.vllm._notices import warn_once
from proxyattn.vllm._versions import require_vllm

require_vllm()

from proxyattn.vllm._sparse import SparseBackend, SparseBuilder, SparseImpl  # noqa: E402


def _parent_classes() -> tuple[type, type, type]:
    """Backend, builder and implementation of the fastest dense attention that is installed."""
    try:
        from vllm.v1.attention.backends import fa_utils, flash_attn

        if (
            fa_utils.is_flash_attn_varlen_func_available()
            and fa_utils.get_flash_attn_version() is not None
        ):
            return (
                flash_attn.FlashAttentionBackend,
                flash_attn.FlashAttentionMetadataBuilder,
                flash_attn.FlashAttentionImpl,
            )
        reason = "vLLM finds no version of it that this GPU can run"
    except ImportError as error:
        reason = str(error)
    warn_once(f"proxyattn: dense rows run Triton's attention, FlashAttention is missing: {reason}")
    from vllm.v1.attention.backends import triton_attn

    return (
        triton_attn.TritonAttentionBackend,
        triton_attn.TritonAttentionMetadataBuilder,
        triton_attn.TritonAttentionImpl,
    )


_Backend, _Builder, _Impl = _parent_classes()


class ProxyBuilder(SparseBuilder, _Builder):
    pass


class ProxyImpl(SparseImpl, _Impl):
    pass


class ProxyBackend(SparseBackend, _Backend):
    @staticmethod
    def get_impl_cls() -> type[ProxyImpl]:
        return ProxyImpl

    @staticmethod
    def get_builder_cls() -> type[ProxyBuilder]:
        return ProxyBuilder
