"""The stages of proxy_attention one by one, for callers that want to see or time what each does."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from proxyattn import ops


@dataclass(frozen=True)
class Settings:
    """The settings of :func:`proxyattn.proxy_attention`, with its defaults."""

    gamma: float = 0.95
    stride: int = 4
    block_size: int = ops.DEFAULT_BLOCK_SIZE
    num_proxy_heads: int | None = None
    budget_mode: str = "last_block"
    min_budget: int | None = None
    num_sink_blocks: int = 1
    num_local_blocks: int = 1

    @property
    def resolved_min_budget(self) -> int:
        """Tokens that every head takes at least, whether given or left to the budget mode."""
        if self.min_budget is not None:
            return self.min_budget
        return ops.DEFAULT_MIN_BUDGET[self.budget_mode]

    def check(self) -> None:
        """Raises ValueError for a value that the op refuses for any model."""
        heads = max(1, self.num_proxy_heads or 1)
        empty = torch.empty(0, 0, heads, 64)
        self.attend(empty, empty, empty)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Causal proxy_attention in one call."""
        return ops.proxy_attention(q, k, v, scale=scale, **asdict(self))


class StageOutputs(NamedTuple):
    """What the stages hand on; shapes as in the functions of the same names."""

    out: Tensor  # [B, M, Hq, D]
    indices: Tensor  # int32 [B, g, Mb, Nb]
    counts: Tensor  # int32 [B, Hq, Mb]
    budgets: Tensor  # [B, Hq]: int32 budgets, or fp32 shares with top_p


#: Names of the stages in the order in which they run.
STAGES = ("pool", "score", "budget", "select", "attend")


def _untimed(stage: str) -> AbstractContextManager:
    return nullcontext()


def run_stages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: Settings,
    scale: float | None = None,
    timed: Callable[[str], AbstractContextManager] = _untimed,
) -> StageOutputs:
    """Causal proxy_attention stage by stage.

    Args:
        q: ``[B, M, Hq, D]``.
        k: ``[B, N, Hkv, D]``.
        v: ``[B, N, Hkv, D]``.
        settings: as for proxy_attention.
        scale: factor of the logits, 1 / sqrt(D) by default.
        timed: gives the context that each stage runs in, from its name in ``STAGES``.
    """
    q_len, kv_len, block_size = q.shape[1], k.shape[1], settings.block_size
    top_p = settings.budget_mode == "top_p"
    with timed("pool"):
        q_proxy, k_proxy = ops.pool_heads(q, k, settings.num_proxy_heads, settings.stride)
    with timed("score"):
        peak, mass = ops.score_blocks(
            q_proxy, k_proxy, q_len, kv_len, settings.stride, block_size, True, scale, top_p
        )
    with timed("budget"):
        if top_p:
            sinks, local = settings.num_sink_blocks, settings.num_local_blocks
            needs = ops.estimate_shares(q, k, block_size, True, scale, sinks, local)
        else:
            needs = ops.estimate_budgets(q, k, settings.gamma, block_size, True, scale)
    with timed("select"):
        indices, counts = ops.select_blocks(
            peak,
            mass,
            needs,
            q_len,
            kv_len,
            q.shape[2],
            block_size,
            True,
            settings.budget_mode,
            settings.gamma,
            settings.min_budget,
            settings.num_sink_blocks,
            settings.num_local_blocks,
        )
    with timed("attend"):
        out, _ = ops.block_sparse_attention(q, k, v, indices, counts, block_size, True, scale)
    return StageOutputs(out, indices, counts, needs)


def visible_blocks(q_len: int, kv_len: int, block_size: int) -> Tensor:
    """Key blocks that each query block of a causal call can see, int64 ``[ceil(q_len / b)]``."""
    ends = torch.arange(block_size, q_len + block_size, block_size).clamp(max=q_len)
    return (kv_len - q_len + ends + block_size - 1) // block_size
