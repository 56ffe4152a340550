"""The memory that a sparse call takes, shown to vLLM while it measures what a step needs.

vLLM gives to the cache what the largest step leaves, and measures a step without attention. What
attention takes beside its output would then not be there.
"""

import torch
from torch import Tensor

from proxyattn.settings import Settings

_MEBIBYTE = 1 << 20
# What README.md says under "Memory": the pieces that rankings are made in, and the kernels' own.
_PIECES = 512 * _MEBIBYTE
_KERNELS = 288 * _MEBIBYTE
# The numbers of logits that the latter holds for.
_PROXY_LOGITS = 1 << 24
_HEAD_LOGITS = 1 << 26


def scratch_bytes(
    settings: Settings,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    element_bytes: int,
    num_keys: int,
) -> int:
    """The most that one call takes whose sequences have ``num_keys`` keys together."""
    heads = settings.num_proxy_heads
    windows = -(-num_keys // settings.stride)
    proxies = windows * min(heads, kv_heads) * head_dim * element_bytes
    times = max(1, heads * num_keys / _PROXY_LOGITS, q_heads * num_keys / _HEAD_LOGITS)
    return proxies + _PIECES + int(times * _KERNELS)


def hold_scratch(query: Tensor, kv_heads: int, max_model_len: int, settings: Settings) -> None:
    """Takes a call's memory from the device for a moment, where there is one."""
    if not query.is_cuda:
        return
    _, q_heads, head_dim = query.shape
    size = scratch_bytes(settings, q_heads, kv_heads, head_dim, query.element_size(), max_model_len)
    torch.empty(size, dtype=torch.uint8, device=query.device)
