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
# Keys that there is room for anyway, so that several prompts of a step are one call: a quarter of a
# GiB of proxies for 8 heads of 128.
_LEAST_KEYS = 1 << 19
# Proxies that a row of many may have more.
_SPARE = 1.125


def keys_of_a_call(max_model_len: int) -> int:
    """Rows times the most keys of one, that a call of several rows may come to."""
    return max(max_model_len, _LEAST_KEYS)


def scratch_bytes(
    settings: Settings,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    element_bytes: int,
    num_keys: int,
) -> int:
    """The most that one call takes, of ``num_keys`` keys as :func:`keys_of_a_call` counts them."""
    heads = settings.num_proxy_heads
    windows = -(-num_keys // settings.stride)
    proxies = int(windows * _SPARE) * min(heads, kv_heads) * head_dim * element_bytes
    times = max(1, heads * num_keys / _PROXY_LOGITS, q_heads * num_keys / _HEAD_LOGITS)
    return proxies + _PIECES + int(times * _KERNELS)


def hold_scratch(query: Tensor, kv_heads: int, num_keys: int, settings: Settings) -> None:
    """Takes a call's memory from the device for a moment; not on CPUs, nor into a graph's pool."""
    if not query.is_cuda or torch.cuda.is_current_stream_capturing():
        return
    _, q_heads, head_dim = query.shape
    size = scratch_bytes(settings, q_heads, kv_heads, head_dim, query.element_size(), num_keys)
    torch.empty(size, dtype=torch.uint8, device=query.device)
