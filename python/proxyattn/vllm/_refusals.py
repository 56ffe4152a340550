"""What sparse attention leaves to vLLM's own code, and the words for it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from proxyattn._config import can_run
from proxyattn.vllm._notices import warn_once

# Also those of ops: check_sequences says what a page may be.
PAGE_SIZES = (16, 32, 64, 128, 256)
_PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")

_REASONS = {
    "alibi": "layers with position biases",
    "sliding window": "layers whose window is shorter than the longest prompt",
    "soft cap": "layers with capped scores",
    "sinks": "layers with learned sinks",
    "argument": "layers with arguments that proxyattn does not know",
    "attention type": "attention that is not a decoder's over its own tokens",
    "context parallel": "contexts spread over devices",
    "cache dtype": "quantised caches, and those of another dtype than the queries",
    "no kernel": "head sizes and dtypes without a kernel, see proxyattn.show_config(),",
    "page size": "caches whose pages have another size than 16, 32, 64, 128 or 256 tokens",
    "cache layout": "caches that do not hold keys and values side by side",
    "lengths": "steps whose lengths are not on the host",
    "cascade": "steps with a prefix shared by all rows (cascade attention)",
    "not causal": "attention that is not causal",
    "bidirectional spans": "prompts with spans whose tokens all see each other",
    "fused output": "layers whose output is quantised in the same call",
}


def say(reason: str) -> None:
    """Logs, once, that what the reason names runs vLLM's own attention."""
    warn_once(f"proxyattn: {_REASONS[reason]} run vLLM's own attention ({reason})")


def refuse_layer(
    *,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    alibi_slopes: Any,
    sliding_window: int | None,
    kv_cache_dtype: str,
    logits_soft_cap: float | None,
    attn_type: str,
    context_parallel: int,
    extra: Mapping[str, Any],
) -> str | None:
    """Why a layer with these arguments can't run sparse, None if it can."""
    if alibi_slopes is not None:
        return "alibi"
    if sliding_window is not None and sliding_window < max_model_len:
        return "sliding window"
    if logits_soft_cap:
        return "soft cap"
    if extra.get("sinks") is not None:
        return "sinks"
    if any(value is not None for value in extra.values()):
        return "argument"
    if attn_type != "decoder":
        return "attention type"
    if context_parallel > 1:
        return "context parallel"
    if kv_cache_dtype not in _PLAIN_CACHES:
        return "cache dtype"
    if not can_run(device, head_size, dtype):
        return "no kernel"
    return None


def refuse_step(common, common_prefix_len: int, page_size: int) -> str | None:
    """Why no row of a step can run sparse, from its ``CommonAttentionMetadata``."""
    if page_size not in PAGE_SIZES:
        return "page size"
    if common_prefix_len > 0:
        return "cascade"
    if common.causal is not True:
        return "not causal"
    spans = ("mm_req_doc_ranges", "rswa_prefix_lens")
    if any(getattr(common, name, None) is not None for name in spans):
        return "bidirectional spans"
    return None


def refuse_cache(kv_cache: Tensor, query: Tensor) -> str | None:
    """Why a cache can't be read; ``[pages, heads, page, 2 * head_dim]`` of one dtype can."""
    if kv_cache.dim() != 4 or kv_cache.shape[3] != 2 * query.shape[2]:
        return "cache layout"
    if kv_cache.dtype != query.dtype:
        return "cache dtype"
    return None
