"""Packed sequences: the functions of :mod:`proxyattn.ops` for sequences of different lengths in one
call, their keys one behind another or in the pages of a cache.

Names and layouts are flash-attn's. Of S sequences, sequence i has the queries
``q[cu_seqlens_q[i]:cu_seqlens_q[i + 1]]`` of ``q [T, Hq, D]``, and its keys are either

- packed likewise: ``k, v [Tk, Hkv, D]`` with ``cu_seqlens_k`` (and, where not all of a sequence's
  keys are there yet, ``seqused_k``), or
- in pages: caches ``k, v [P, page, Hkv, D]``, ``page`` being 16, 32, 64, 128 or 256, with
  ``block_table [S, pages]``, whose row i names the pages of sequence i in order, and ``seqused_k``,
  how many keys it has, those of its queries among them. K and V may be views of one tensor.

The last dimension of q, k, v and out is contiguous, all other strides are free. All numbers that
say where things are, int32 tensors, lie on the device of q, are read there and may change between
replays of a captured graph. ``max_seqlen_q`` and ``max_seqlen_k`` are capacities, as are the sizes
of tensors: scratch and launches follow them, and sequences may be shorter, q and k longer than what
is used of them.

Every sequence is treated as a dense call over it alone would treat it: its last query stands at its
last key. With more queries than keys the first ones, when causal, see nothing and get 0 and -inf. A
sequence without queries is fine, and what is in another sequence, in pages that the table does not
name or behind the last key of a page never reaches an output, NaN or not.

Errors are raised as in :mod:`proxyattn.ops` for all that the host can see: shapes, dtypes, devices,
strides, page sizes, capacities below 1, ``cu_seqlens_k`` and ``block_table`` both given or neither.
What only the device knows is cut to what tensors and capacities hold: nothing outside is read or
written, and the sequence's numbers mean nothing. With ``PROXYATTN_CHECK=1`` in the environment
every call, of the ops too, begins with :func:`check_sequences`, and attention to lists with a check
of these.
"""

import torch
from torch import Tensor

from proxyattn.ops import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_GAMMA,
    DEFAULT_MIN_BUDGET,
    _default_of,
    _proxy_heads,
)


def block_sparse_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    indices: Tensor,
    counts: Tensor,
    *,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    window: int | None = None,
    sink_logits: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention of each query over the key blocks listed for its query block and head.

    Query blocks are numbered over all sequences, one sequence after another, each beginning a new
    one: sequence i's first is ``sum(ceil(q_len[j] / block_size) for j < i)``, and there are at most
    ``R = T // block_size + S``. Lists of query blocks behind the last are not looked at.

    Args:
        q: ``[T, Hq, D]``.
        k: ``[Tk, Hkv, D]``, or a cache ``[P, page, Hkv, D]``.
        v: as k.
        cu_seqlens_q: int32 ``[S + 1]``, rising.
        cu_seqlens_k: int32 ``[S + 1]``, rising; None with ``block_table``.
        max_seqlen_q: queries that a sequence has at most.
        max_seqlen_k: keys that a sequence has at most.
        indices: int32 ``[L, R, C]``; entries name key blocks of the sequence, not pages. L divides
            Hq and Hq / L consecutive heads share a list.
        counts: int32 ``[Hq, R]``, entries that each head reads.
        block_table: int32 ``[S, pages]``. Entries behind the last page that is used may be
            anything.
        seqused_k: int32 ``[S]``, keys of each sequence; with ``cu_seqlens_k`` None means all.
        block_size: 64 or 128 tokens.
        causal: mask keys behind the query, bottom-right aligned in each sequence.
        scale: factor of the logits, 1 / sqrt(D) by default.
        return_lse: compute the log-sum-exp too.
        window, sink_logits: as in :func:`proxyattn.block_sparse_attention`.
        out: ``[T, Hq, D]`` in the dtype of q, apart from q, k and v: where to write. Rows of tokens
            that are in no sequence stay as they are.

    Returns:
        ``out``, that which was given or a new tensor, and ``lse`` fp32 ``[Hq, T]``, natural log, or
        an empty tensor of shape ``[0]`` unless asked for. Tokens that are in no sequence have
        anything there.
    """
    result, lse = torch.ops.proxyattn.block_sparse_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        indices,
        counts,
        block_table,
        seqused_k,
        block_size,
        causal,
        scale,
        return_lse,
        out,
        window,
        sink_logits,
    )
    return result if out is None else out, lse


def choose_blocks_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    gamma: float | None = None,
    stride: int = 4,
    pooling: str = "mean",
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_proxy_heads: int | None = None,
    budget_mode: str = "top_p",
    min_budget: int | None = None,
    num_sink_blocks: int = 1,
    num_local_blocks: int = 1,
    shares: Tensor | None = None,
    window: int | None = None,
    max_workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses the key blocks of every sequence: pools, scores, estimates and selects in one call.

    Args:
        q, k, cu_seqlens_q, ..., seqused_k: as in :func:`block_sparse_attention_varlen`, after the
            rotary embedding.
        causal, scale, ..., num_local_blocks: as in :func:`proxyattn.proxy_attention`.
        shares: fp32 ``[S, Hq]``, of every sequence what :func:`proxyattn.estimate_shares` gives;
            ``"top_p"`` only. None: they are estimated from this call.
        window, max_workspace_bytes: as in :func:`proxyattn.proxy_attention`.

    Returns:
        What :func:`block_sparse_attention_varlen` takes: ``indices`` int32
        ``[g, R, ceil(max_seqlen_k / block_size)]``, -1 after the last visible block of a sequence,
        and ``counts`` int32 ``[Hq, R]``. Query blocks behind the last sequence have counts of 0 and
        anything for indices.
    """
    return torch.ops.proxyattn.choose_blocks_varlen(
        q,
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        block_table,
        seqused_k,
        causal,
        scale,
        _default_of(DEFAULT_GAMMA, gamma, budget_mode),
        stride,
        pooling,
        block_size,
        _proxy_heads(num_proxy_heads, q, k),
        budget_mode,
        _default_of(DEFAULT_MIN_BUDGET, min_budget, budget_mode),
        num_sink_blocks,
        num_local_blocks,
        shares,
        max_workspace_bytes,
        window,
    )


def proxy_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    gamma: float | None = None,
    stride: int = 4,
    pooling: str = "mean",
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_proxy_heads: int | None = None,
    budget_mode: str = "top_p",
    min_budget: int | None = None,
    num_sink_blocks: int = 1,
    num_local_blocks: int = 1,
    shares: Tensor | None = None,
    window: int | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    max_workspace_bytes: int | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention of packed prompts, or chunks of prompts behind what a cache holds of them.

    Args:
        q, k, v, cu_seqlens_q, ..., seqused_k: as in :func:`block_sparse_attention_varlen`, after
            the rotary embedding.
        causal, scale, ..., num_local_blocks: as in :func:`proxyattn.proxy_attention`.
        shares: fp32 ``[S, Hq]``, of every sequence what :func:`proxyattn.estimate_shares` gives;
            ``"top_p"`` only. None: they are estimated from this call. With shares given, the chunks
            of a prompt, cut at multiples of ``block_size``, read what the whole prompt would.
        window, sink_logits: as in :func:`proxyattn.proxy_attention`.
        return_lse: return the log-sum-exp too.
        max_workspace_bytes: as in :func:`proxyattn.proxy_attention`.
        out: as in :func:`block_sparse_attention_varlen`.

    Returns:
        ``out [T, Hq, D]``, that which was given or a new tensor; with ``return_lse`` also ``lse``
        fp32 ``[Hq, T]``, natural log. Tokens that are in no sequence have anything in new tensors.
    """
    result, lse = torch.ops.proxyattn.proxy_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        block_table,
        seqused_k,
        causal,
        scale,
        _default_of(DEFAULT_GAMMA, gamma, budget_mode),
        stride,
        pooling,
        block_size,
        _proxy_heads(num_proxy_heads, q, k),
        budget_mode,
        _default_of(DEFAULT_MIN_BUDGET, min_budget, budget_mode),
        num_sink_blocks,
        num_local_blocks,
        shares,
        return_lse,
        max_workspace_bytes,
        out,
        window,
        sink_logits,
    )
    result = result if out is None else out
    return (result, lse) if return_lse else result


def check_sequences(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> None:
    """Raises ValueError unless sequences and pages lie where tensors and capacities let them.

    Starts must not decrease nor lead outside, lengths not exceed the capacities, and the table name
    pages that there are, as far as keys reach. The error names the first entry that is wrong. For
    debugging: it waits for the device and copies these numbers to the host.

    Args:
        q, k, cu_seqlens_q, ..., seqused_k: as in :func:`block_sparse_attention_varlen`.
    """
    torch.ops.proxyattn._check_sequences(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k
    )
