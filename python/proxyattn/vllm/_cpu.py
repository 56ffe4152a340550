"""The backend on CPUs, for tests: a plain one over vLLM's pages, with long rows sparse.

vLLM's own CPU backend keeps keys in an order of its kernels, so this one, dense rows and all, runs
on proxyattn's kernels. vLLM takes what stands for its CPU backend and nothing else; so that it gets
its own where this one isn't chosen, ``Backend`` is looked up when vLLM asks for it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from proxyattn.varlen import proxy_attention_varlen
from proxyattn.vllm._registration import is_chosen
from proxyattn.vllm._versions import require_vllm


def __getattr__(name: str) -> type:
    if name != "Backend":
        raise AttributeError(name)
    config = get_current_vllm_config_or_none()
    if config is None or not is_chosen(config.attention_config):
        return CPUAttentionBackend
    return ProxyCpuBackend


require_vllm()

from proxyattn.vllm._sparse import SparseBackend, SparseBuilder, SparseImpl  # noqa: E402


@dataclass
class _Metadata:
    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    max_seq_len: int
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor


class _PagedBuilder(AttentionMetadataBuilder):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> _Metadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError("proxyattn.vllm: attention on CPUs must be causal, got another")
        return _Metadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )


class _PagedImpl(AttentionImpl):
    """Dense attention over pages ``[heads, page, 2 * head_size]``, keys and values side by side."""

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads,
        alibi_slopes,
        sliding_window,
        kv_cache_dtype,
        logits_soft_cap,
        attn_type,
        kv_sharing_target_layer_name,
        **extra,
    ):
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        slots = slot_mapping[slot_mapping >= 0]
        new = torch.cat((key, value), dim=-1)[: slot_mapping.shape[0]][slot_mapping >= 0]
        page = kv_cache.shape[2]
        kv_cache[slots // page, :, slots % page] = new

    def forward(
        self,
        layer,
        query,
        key,
        value,
        kv_cache,
        attn_metadata,
        output,
        output_scale=None,
        output_block_scale=None,
    ) -> Tensor:
        if attn_metadata is None:
            return output.fill_(0)
        tokens = slice(attn_metadata.num_actual_tokens)
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        proxy_attention_varlen(
            query[tokens],
            keys,
            values,
            attn_metadata.query_start_loc,
            None,
            attn_metadata.max_query_len,
            attn_metadata.max_seq_len,
            block_table=attn_metadata.block_table,
            seqused_k=attn_metadata.seq_lens,
            scale=self.scale,
            gamma=1.0,
            out=output[tokens],
        )
        return output


class ProxyCpuBuilder(SparseBuilder, _PagedBuilder):
    pass


class ProxyCpuImpl(SparseImpl, _PagedImpl):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.dense_reason is not None:
            raise ValueError(
                "proxyattn.vllm: layers on CPUs must be plain causal ones, since vLLM's own "
                f"attention can't stand in for them there, got one with: {self.dense_reason}"
            )


class ProxyCpuBackend(SparseBackend, CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[ProxyCpuImpl]:
        return ProxyCpuImpl

    @staticmethod
    def get_builder_cls() -> type[ProxyCpuBuilder]:
        return ProxyCpuBuilder
