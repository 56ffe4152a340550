"""Attention of a batch of sequences that lie on the ranks of a process group."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from proxyattn.distributed.call import prepare
from proxyattn.varlen import proxy_attention_varlen


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
    call = prepare(
        q,
        k,
        v,
        group=group,
        layout=layout,
        causal=causal,
        scale=scale,
        cached=cached,
        shares=shares,
        max_gather_bytes=max_gather_bytes,
        max_workspace_bytes=max_workspace_bytes,
        settings=settings,
    )
    out = q.new_empty(q.shape)
    batch, tokens, q_heads, _ = q.shape
    lse_shape = (batch, q_heads, tokens) if return_lse else (0,)
    lse = q.new_empty(lse_shape, dtype=torch.float32)
    for heads, arguments in call.groups():
        result = proxy_attention_varlen(
            **arguments,
            return_lse=return_lse,
            max_workspace_bytes=max_workspace_bytes,
            out=out.flatten(0, 1)[:, heads],
        )
        if return_lse:
            lse[:, heads] = result[1].unflatten(1, (batch, tokens)).transpose(0, 1)
    return (out, lse) if return_lse else out
