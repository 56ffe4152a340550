"""Attention of a batch of sequences that lie on the ranks of a process group."""

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
from proxyattn.distributed.pages import Tokens, pack
from proxyattn.distributed.shares import LastQueries
from proxyattn.settings import Settings
from proxyattn.varlen import proxy_attention_varlen

_OP = "context_parallel_attention"


@torch.compiler.disable  # collectives must not be cut apart differently on different ranks
def context_parallel_attention(
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
    return_lse: bool = False,
    max_gather_bytes: int | None = None,
    max_workspace_bytes: int | None = None,
    **settings,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`proxyattn.proxy_attention` of sequences whose tokens lie on W ranks.

    Every rank of the group calls it with its shard of the batch and gets its shard of the output,
    that of one call over the whole sequences: for given shares every query block reads the same
    blocks. The sequences of the batch are equally long and cut into chunks of one length, a
    multiple of ``block_size``, of which only the last may be shorter; :func:`shard` does that.

    Keys and values travel in the input's dtype, a group of kv heads at a time, while the group
    before is attended to, and are read where they arrive. Beside what the packed call takes
    (README, "Memory", for as many sequences as the rank has chunks), a rank holds

        2 * W * B * n * min(2 * h, Hkv) * D * element size

    bytes, where n is the most keys that a rank brings, rounded up to a page, and h the kv heads of
    a group.

    The call waits for all ranks once, before anything else, to compare their arguments, and can't
    be captured in a graph. A rank that never calls is a matter for the group's timeout.

    Args:
        q: ``[B, m, Hq, D]``, after the rotary embedding: this rank's tokens, its chunks one behind
            another.
        k: ``[B, n, Hkv, D]``, likewise. With n > m the first n - m are the rank's shard of keys
            that earlier calls brought, which all queries see.
        v: as k.
        group: ranks in the order of their chunks; the default group if None.
        layout: ``"zigzag"``: of 2W chunks rank r holds r and 2W - 1 - r, which evens out causal
            work; ``"contiguous"``: of W chunks it holds the r-th.
        causal: mask keys behind the query.
        scale: factor of the logits, 1 / sqrt(D) by default.
        cached: how many of the rank's keys each earlier call brought, in order; they were sharded
            in the same layout, and each call's chunks and whole length are multiples of 16 tokens.
            None: all that k has more than q came with one call.
        shares: fp32 ``[B, Hq]``, what :func:`proxyattn.estimate_shares` gives for the whole
            sequences, the same on every rank. None: they are estimated from this call, to within
            rounding what one process would find.
        return_lse: return the log-sum-exp too.
        max_gather_bytes: cap on the bytes above; groups are of fewer heads then, down to those of
            one proxy. None lets it choose: groups as small as travel well.
        max_workspace_bytes: cap on the scratch memory of the attention of one group, see
            :func:`proxyattn.proxy_attention`.
        settings: the fields of :class:`proxyattn.Settings`. ``budget_mode`` is ``"top_p"``.

    Returns:
        ``out [B, m, Hq, D]`` in the dtype of q; with ``return_lse`` also ``lse`` fp32
        ``[B, Hq, m]``, natural log.

    Raises:
        ValueError, TypeError, RuntimeError: on all ranks alike and before any of them begins, as
            the functions of :mod:`proxyattn.ops`, and where arguments differ between ranks.
    """
    call = _agreed(
        *(q, k, v, dist.group.WORLD if group is None else group, layout, causal, scale, cached),
        *(shares, max_gather_bytes, max_workspace_bytes, settings),
    )
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[2], q.shape[0] * q.shape[1], dtype=torch.float32)
    for heads, arguments in call.groups():
        result = proxy_attention_varlen(
            **arguments,
            return_lse=return_lse,
            max_workspace_bytes=max_workspace_bytes,
            out=out.flatten(0, 1)[:, heads],
        )
        if return_lse:
            lse[heads] = result[1]
    return (out, lse.unflatten(1, q.shape[:2]).transpose(0, 1)) if return_lse else out


@dataclass(frozen=True)
class _Call:
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

    def groups(self) -> Iterator[tuple[slice, dict[str, Any]]]:
        """One group of heads after another: the query heads, and what they take of the varlen ops.

        A group's keys are there until the next but one is asked for.
        """
        batch, _, q_heads, _ = self.q.shape
        if batch == 0 or self.tokens.shardings[-1].total == 0:
            return
        rank = dist.get_rank(self.group)
        packed = pack(_OP, self.tokens, batch, rank, self.causal)
        places = packed.places(self.q.device)
        estimate = None
        if self.shares is None and self.settings.gamma < 1:
            # Before the first keys are on their way, or they would hold it up.
            estimate = LastQueries(
                self.q, self.tokens, self.settings, self.causal, self.scale, self.group
            )
        gather = Gather(self.k, self.v, self.heads, packed.capacity, packed.page, self.group)
        gather.start(0)
        shares = self.shares if estimate is None else estimate.shares(self.k)
        if shares is not None:
            shares = shares.repeat_interleave(packed.num_sequences // batch, dim=0)
        q = self.q.flatten(0, 1)
        kv_heads = self.k.shape[2]
        for i, kv in enumerate(gather.groups):
            gather.start(i + 1)
            k, v = gather.wait(i)
            heads = slice(kv.start * q_heads // kv_heads, kv.stop * q_heads // kv_heads)
            proxies = (kv.stop - kv.start) * self.settings.num_proxy_heads // kv_heads
            yield (
                heads,
                {
                    **{"q": q[:, heads], "k": k, "v": v},
                    **places,
                    **replace(self.settings, num_proxy_heads=proxies).to_dict(),
                    "causal": self.causal,
                    "scale": self.scale,
                    "shares": None if shares is None else shares[:, heads],
                },
            )


def _agreed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup,
    layout: str,
    causal: bool,
    scale: float | None,
    cached: Sequence[int] | None,
    shares: Tensor | None,
    max_gather_bytes: int | None,
    max_workspace_bytes: int | None,
    settings: dict[str, Any],
) -> _Call:
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
            "number of cached": len(own["cached"]),
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
    return _Call(q, k, v, group, tokens, resolved, heads, bool(causal), scale, shares)


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
