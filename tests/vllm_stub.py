"""Modules that stand for vLLM's, as far as proxyattn.vllm looks at them, in two of its versions.

The dense attention of ``flash_attn`` has FlashAttention 3's trap: what it schedules by lies in one
buffer, so that of the metadata made in a step only the last that was scheduled is right.
"""

import sys
from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from proxyattn import proxy_attention_varlen

VERSIONS = ("0.26", "0.33")

# Fields of CommonAttentionMetadata that one of the versions has.
_EXTRA_FIELDS = {
    "0.26": ("_seq_lens_cpu", "_num_computed_tokens_cpu", "_num_computed_tokens_cache"),
    "0.33": ("req_idx", "_num_computed_tokens_cache", "_token_to_req_indices_cache"),
}
_FIELDS = (
    "query_start_loc",
    "query_start_loc_cpu",
    "seq_lens",
    "num_reqs",
    "num_actual_tokens",
    "max_query_len",
    "max_seq_len",
    "block_table_tensor",
    "slot_mapping",
)
_OPTIONAL = (
    "positions",
    "is_prefilling",
    "seq_lens_cpu_upper_bound",
    "mm_req_doc_ranges",
    "rswa_prefix_lens",
)


class CGSupport(Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class _Builder:
    reorder_batch_threshold = None
    supports_update_block_table = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec, self.vllm_config, self.device = kv_cache_spec, vllm_config, device

    def _init_reorder_batch_threshold(self, threshold=1, supports_spec_as_decode=False):
        self.reorder_batch_threshold = threshold

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        return cls.cudagraph_support


class FlashBuilder(_Builder):
    cudagraph_support = CGSupport.ALWAYS

    def __init__(self, *args):
        super().__init__(*args)
        self._schedule = torch.zeros(64, dtype=torch.int32)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        schedule = None
        if not fast_build:
            schedule = self._schedule[: common.num_reqs]
            schedule.copy_(common.seq_lens)
        return FlashMetadata(common, schedule)


@dataclass
class FlashMetadata:
    common: Any
    schedule: torch.Tensor | None


class FlashImpl:
    dcp_world_size = pcp_world_size = 1

    def __init__(self, num_heads, head_size, scale, num_kv_heads, *args, **extra):
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads
        self.calls = []

    def fused_output_quant_supported(self, quant_key):
        return True

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *scales):
        if metadata is None:
            return output.fill_(0)
        common = metadata.common
        self.calls.append(common.seq_lens.tolist())
        if metadata.schedule is not None:
            assert torch.equal(metadata.schedule, common.seq_lens), "another's schedule"
        tokens = slice(common.num_actual_tokens)
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        proxy_attention_varlen(
            query[tokens],
            keys,
            values,
            common.query_start_loc,
            None,
            common.max_query_len,
            common.max_seq_len,
            block_table=common.block_table_tensor,
            seqused_k=common.seq_lens,
            scale=self.scale,
            gamma=1.0,
            out=output[tokens],
        )
        return output


class FlashBackend:
    @classmethod
    def supports_block_size(cls, size):
        return size % 16 == 0

    @classmethod
    def get_preferred_block_size(cls, default):
        return default


def _registry(version):
    overrides = {}

    class Backends(Enum):
        FLASH_ATTN = "flash"
        CPU_ATTN = "cpu"
        CUSTOM = None

        def is_overridden(self):
            return self in overrides

        def get_path(self):
            return overrides.get(self, self.value)

    if version == "0.33":
        Backends.register = classmethod(lambda cls, name, value: None)

    def register_backend(backend, class_path=None):
        if isinstance(backend, str):
            if backend in Backends.__members__:
                raise ValueError(f"Backend {backend} already exists")
            member = SimpleNamespace(name=backend, get_path=lambda: class_path)
            Backends._member_map_[backend] = member
        else:
            overrides[backend] = class_path

    return {"AttentionBackendEnum": Backends, "register_backend": register_backend}


def install(monkeypatch, version, *, flash=True, device="cuda", config=None, without=()):
    """Puts the modules in the place of vLLM's, for a test.

    Args:
        flash: whether FlashAttention is there.
        device: what kind of platform it is.
        config: the current VllmConfig.
        without: fields that CommonAttentionMetadata lacks.

    Returns:
        The class CommonAttentionMetadata and the enumeration of backends.
    """
    optional = [(name, Any, field(default=None)) for name in _OPTIONAL + _EXTRA_FIELDS[version]]
    fields_ = [(name, Any) for name in _FIELDS]
    common = make_dataclass(
        "CommonAttentionMetadata",
        [f for f in (*fields_, *optional, ("causal", Any, True)) if f[0] not in without],
    )
    registry = _registry(version)
    parent = {
        "FlashAttentionBackend": FlashBackend,
        "FlashAttentionMetadataBuilder": FlashBuilder,
        "FlashAttentionImpl": FlashImpl,
    }
    triton = {}
    for flash_name, kind in parent.items():
        name = flash_name.replace("Flash", "Triton")
        triton[name] = type(name, (kind,), {})
    modules = {
        "vllm": {"__version__": f"{version}.0"},
        "vllm.config": {"get_current_vllm_config": lambda: config},
        "vllm.platforms": {
            # Tensors are on the CPU here, whatever is made out.
            "current_platform": SimpleNamespace(is_cpu=lambda: device == "cpu", device_type="cpu")
        },
        "vllm.utils": {},
        "vllm.utils.torch_utils": {"canonicalize_singleton_dim_strides": lambda x: x},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionCGSupport": CGSupport,
            "AttentionMetadataBuilder": _Builder,
            "CommonAttentionMetadata": common,
        },
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.registry": registry,
        "vllm.v1.attention.backends.fa_utils": {
            "is_flash_attn_varlen_func_available": lambda: flash,
            "get_flash_attn_version": lambda: 3 if flash else None,
        },
        "vllm.v1.attention.backends.flash_attn": parent,
        "vllm.v1.attention.backends.triton_attn": triton,
    }
    for name in ("_sparse", "_gpu", "_cpu"):
        # Set before it is deleted, so that it is put back, or taken away again, after the test.
        monkeypatch.setitem(sys.modules, f"proxyattn.vllm.{name}", None)
        del sys.modules[f"proxyattn.vllm.{name}"]
    for name, content in modules.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in modules:
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, sys.modules[name])
    return common, registry["AttentionBackendEnum"]


def make_config(layers=None, max_model_len=1 << 20, **settings):
    """A VllmConfig: settings of proxyattn, and layers by their names."""
    return SimpleNamespace(
        additional_config={"proxyattn": settings},
        model_config=SimpleNamespace(max_model_len=max_model_len, dtype=torch.float32),
        compilation_config=SimpleNamespace(static_forward_context={} if layers is None else layers),
    )
