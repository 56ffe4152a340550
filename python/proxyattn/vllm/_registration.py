"""What vLLM calls in each of its processes: naming the backend, without importing it."""

from proxyattn.vllm._notices import warn_once

NAME = "PROXYATTN"
_GPU = "proxyattn.vllm._gpu.ProxyBackend"
_CPU = "proxyattn.vllm._cpu.Backend"


def register() -> None:
    """Makes the backend known to vLLM; the entry point of group ``vllm.general_plugins``.

    It may be called any number of times. Versions of vLLM without what it needs are left alone, and
    so is a ``CUSTOM`` backend of somebody else; one logged line says so.
    """
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        warn_once(f"proxyattn.vllm: this vLLM has no registry of attention backends ({error})")
        return
    if current_platform.is_cpu():
        # There vLLM takes no other backend than this, whatever is chosen: see _cpu.py.
        register_backend(AttentionBackendEnum.CPU_ATTN, _CPU)
    _register_custom(AttentionBackendEnum, register_backend)
    # Versions whose backends can have names of their own.
    if hasattr(AttentionBackendEnum, "register") and NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, _GPU)


def _register_custom(enum, register_backend) -> None:
    custom = enum.CUSTOM
    if custom.is_overridden() and custom.get_path() != _GPU:
        warn_once(
            f"proxyattn.vllm: attention backend CUSTOM is {custom.get_path()} already and stays "
            "it; VLLM_PLUGINS chooses which plugins are loaded"
        )
        return
    register_backend(custom, _GPU)


def is_chosen(attention_config) -> bool:
    """Whether an ``AttentionConfig`` asks for this backend, for all layers or those of a kind."""
    per_kind = getattr(attention_config, "backend_per_kind", None) or {}
    backends = (attention_config.backend, *per_kind.values())
    return any(getattr(backend, "name", None) in ("CUSTOM", NAME) for backend in backends)
