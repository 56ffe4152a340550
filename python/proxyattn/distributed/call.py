"""A call that all ranks agree on, and its groups of heads one after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from proxyattn.distributed.agreement import Description, agree
from proxyattn.distributed.collectives import device_types
from proxyattn.distributed.gather import Gather, group_heads
from proxyattn.distributed.layout import check_chunks, check_layout, sharding_of
from proxyattn.distributed.pages import Packed, Tokens, pack
from proxyattn.distributed.shares import LastQueries
from proxyattn.settings import Settings
from proxyattn.varlen import proxy_attention_varlen

_OP = "context_parallel_attention"


@dataclass(frozen=True)
class Call:
    """What all ranks agree on, and this rank's tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    group: dist.ProcessGroup
    tokens: Tokens
    settings: Settings  # nothing left open
    heads: int  # kv heads of a group
    causal: bool
    scale: float
    shares: Tensor | None

    def packed(self) -> Packed:
        rank = dist.get_rank(self.group)
        return pack(_OP, self.tokens, self.q.shape[0], rank, self.causal)

    def gather(self) -> Gather:
        packed = self.packed()
        return Gather(self.k, self.v, self.heads, packed.capacity, packed.page, self.group)

    def estimate(self) -> LastQueries | None:
        """What makes the shares, where they are wanted; collective."""
        if self.shares is not None or self.settings.gamma >= 1:
            return None
        return LastQueries(self.q, self.tokens, self.settings, self.causal, self.scale, self.group)

    def groups(self) -> Iterator[tuple[slice, dict[str, Any]]]:
        """One group of heads after another: the query heads, and what they take of the varlen ops.

        A group's keys are there until the next but one is asked for.
        """
        batch, _, q_heads, _ = self.q.shape
        if batch == 0 or self.tokens.shardings[-1].total == 0:
            return
        packed = self.packed()
        places = packed.places(self.q.device)
        # Queries before the first keys, which would hold them up.
        estimate, gather = self.estimate(), self.gather()
        gather.start(0)
        shares = self.shares if estimate is None else estimate.shares(self.k)
        if shares is not None:
            shares = shares.repeat_interleave(packed.num_sequences // batch, dim=0)
        q, kv_heads = self.q.flatten(0, 1), self.k.shape[2]
        for i, kv in enumerate(gather.groups):
            gather.start(i + 1)
            k, v = gather.wait(i)
            heads = slice(kv.start * q_heads // kv_heads, kv.stop * q_heads // kv_heads)
            proxies = (kv.stop - kv.start) * self.settings.num_proxy_heads // kv_heads
            arguments = {
                "q": q[:, heads],
                "k": k,
                "v": v,
                "causal": self.causal,
                "scale": self.scale,
                "shares": None if shares is None else shares[:, heads],
            }
            settings = replace(self.settings, num_proxy_heads=proxies).to_dict()
            yield heads, {**arguments, **places, **settings}


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    causal: bool = True,
    scale: float | None = None,
    cached: Sequence[int] | None = None,
    shares: Tensor | None = None,
    max_gather_bytes: int | None = None,
    max_workspace_bytes: int | None = None,
    settings: dict[str, Any],
) -> Call:
    """Checks what this rank brings and compares it with what the others bring; collective."""
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError(f"{_OP}: group must hold this process, got a group of others")
    resolved, shared, own, fault = None, {}, {}, None
    try:
        check_layout(_OP, layout)
        resolved = _settings(q, k, settings)
        _check(q, k, v, group, causal, scale, shares, resolved)
        own = {"queries": q.shape[1], "cached": _cached(q, k, cached)}
        scale = q.shape[3] ** -0.5 if scale is None else float(scale)
        shared = {
            "layout": layout,
            "causal": bool(causal),
            "scale": scale,
            "dtype": str(q.dtype).removeprefix("torch."),
            "device": q.device.type,
            "batch": q.shape[0],
            "q_heads": q.shape[2],
            "kv_heads": k.shape[2],
            "head_dim": q.shape[3],
            "length of cached": len(own["cached"]),
            "shares": "None" if shares is None else "given",
            "max_gather_bytes": max_gather_bytes,
            "max_workspace_bytes": max_workspace_bytes,
            **resolved.to_dict(),
        }
    except Exception as error:  # whatever keeps this rank from the call keeps all
        fault = error
    everyone = agree(_OP, Description(shared, own, fault), group)

    earlier = zip(*(one["cached"] for one in everyone), strict=True)
    tokens = Tokens(
        tuple(
            sharding_of(_OP, name, list(lengths), layout)
            for name, lengths in [
                *(("cached", lengths) for lengths in earlier),
                ("q", [one["queries"] for one in everyone]),
            ]
        )
    )
    check_chunks(_OP, tokens.shardings[-1], resolved.block_size)
    capacity = tokens.capacity(_OP)
    heads = group_heads(
        _OP,
        k.shape[2],
        max(1, k.shape[2] // resolved.num_proxy_heads),
        2 * len(everyone) * k.shape[0] * capacity * k.shape[3] * k.element_size(),
        max_gather_bytes,
    )
    return Call(q, k, v, group, tokens, resolved, heads, bool(causal), scale, shares)


def _settings(q: Tensor, k: Tensor, settings: dict[str, Any]) -> Settings:
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{_OP}: {name} must have 4 dimensions, got shape {list(x.shape)}")
    resolved = Settings.from_dict(settings).resolve(q.shape[2], k.shape[2])
    if resolved.budget_mode != "top_p":
        raise ValueError(
            f"{_OP}: budget_mode must be 'top_p', got {resolved.budget_mode!r}, whose budgets "
            f"belong to the last queries of one call"
        )
    return resolved


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup,
    causal: bool,
    scale: float | None,
    shares: Tensor | None,
    settings: Settings,
) -> None:
    """What one rank can see wrong, by the rules of the op that it will call."""
    batch, tokens, q_heads, head_dim = q.shape
    expected = [batch, k.shape[1], k.shape[2], head_dim]
    for name, x in (("k", k), ("v", v)):
        if list(x.shape) != expected:
            raise ValueError(f"{_OP}: {name} must have shape {expected}, got {list(x.shape)}")
    if k.shape[1] < tokens:
        raise ValueError(
            f"{_OP}: k must have a key for every query, got {k.shape[1]} for {tokens} queries"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.numel() > 0 and x.stride(-1) != 1:
            raise ValueError(
                f"{_OP}: {name} must be contiguous in its last dimension, got strides "
                f"{list(x.stride())}"
            )
    types = device_types(group)
    if q.device.type not in types:
        raise TypeError(
            f"{_OP}: q must be on a device whose tensors the group exchanges, {' or '.join(types)},"
            f" got {q.device}"
        )
    if shares is not None:
        if list(shares.shape) != [batch, q_heads]:
            raise ValueError(
                f"{_OP}: shares must have shape {[batch, q_heads]}, got {list(shares.shape)}"
            )
        shares = shares[:0]
    starts = torch.zeros(1, dtype=torch.int32, device=q.device)
    proxy_attention_varlen(
        *(x[:0].flatten(0, 1) for x in (q, k, v)),
        *(starts, starts, 1, 1),
        causal=causal,
        scale=scale,
        shares=shares,
        **settings.to_dict(),
    )


def _cached(q: Tensor, k: Tensor, cached: Sequence[int] | None) -> list[int]:
    more = k.shape[1] - q.shape[1]
    lengths = [more] if cached is None else [int(length) for length in cached]
    if sum(lengths) != more or any(length < 0 for length in lengths):
        raise ValueError(
            f"{_OP}: cached must count the {more} keys that k has more than q, got {lengths}"
        )
    return lengths
