"""The stages of proxy_attention one by one, for callers that want to see or time what each does."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from proxyattn import ops
from proxyattn.settings import Settings


class StageOutputs(NamedTuple):
    """What the stages hand on; shapes as in the functions of the same names."""

    out: Tensor  # [B, M, Hq, D]
    indices: Tensor  # int32 [B, g, Mb, Nb]
    counts: Tensor  # int32 [B, Hq, Mb]
    needs: Tensor  # [B, Hq]: fp32 shares for top_p, int32 budgets for last_block


class StageCall(NamedTuple):
    """One call of :func:`run_stages`, for those who watch."""

    q: Tensor
    k: Tensor
    v: Tensor
    settings: Settings
    scale: float | None
    outputs: StageOutputs


Observer = Callable[[StageCall], None]
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Shows every call of run_stages inside the block to the observer, once it is done."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def _untimed(stage: str) -> AbstractContextManager:
    return nullcontext()


def run_stages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: Settings,
    scale: float | None = None,
    sink_logits: Tensor | None = None,
    timed: Callable[[str], AbstractContextManager] = _untimed,
) -> StageOutputs:
    """Causal proxy_attention stage by stage.

    Args:
        q: ``[B, M, Hq, D]``.
        k: ``[B, N, Hkv, D]``.
        v: ``[B, N, Hkv, D]``.
        settings: as for proxy_attention.
        scale: factor of the logits, 1 / sqrt(D) by default.
        sink_logits: as for proxy_attention.
        timed: gives the context that each stage runs in, from the name of its function.
    """
    (q_len, q_heads), kv_len = q.shape[1:3], k.shape[1]
    settings = settings.resolve(q_heads, k.shape[2])
    top_p = settings.budget_mode == "top_p"
    logits = {"block_size": settings.block_size, "causal": True, "scale": scale}
    forced = {
        "num_sink_blocks": settings.num_sink_blocks,
        "num_local_blocks": settings.num_local_blocks,
    }
    with timed("pool_heads"):
        q_proxy, k_proxy = ops.pool_heads(
            q, k, settings.num_proxy_heads, settings.stride, settings.pooling
        )
    with timed("score_blocks"):
        peak, mass = ops.score_blocks(
            q_proxy, k_proxy, q_len, kv_len, settings.stride, with_mass=top_p, **logits
        )
    if top_p:
        with timed("estimate_shares"):
            needs = ops.estimate_shares(q, k, **logits, **forced)
    else:
        with timed("estimate_budgets"):
            needs = ops.estimate_budgets(q, k, settings.gamma, **logits)
    with timed("select_blocks"):
        indices, counts = ops.select_blocks(
            peak,
            mass if top_p else None,
            needs,
            q_len,
            kv_len,
            q_heads,
            block_size=settings.block_size,
            causal=True,
            budget_mode=settings.budget_mode,
            gamma=settings.gamma,
            min_budget=settings.min_budget,
            **forced,
        )
    with timed("block_sparse_attention"):
        out, _ = ops.block_sparse_attention(
            q, k, v, indices, counts, **logits, sink_logits=sink_logits
        )
    outputs = StageOutputs(out, indices, counts, needs)
    if not torch.compiler.is_compiling():  # which can't read context variables
        for observer in _observers.get():
            observer(StageCall(q, k, v, settings, scale, outputs))
    return outputs


def visible_blocks(q_len: int, kv_len: int, block_size: int) -> Tensor:
    """Key blocks that each query block of a causal call can see, int64 ``[ceil(q_len / b)]``."""
    ends = torch.arange(block_size, q_len + block_size, block_size).clamp(max=q_len)
    return (kv_len - q_len + ends + block_size - 1) // block_size
