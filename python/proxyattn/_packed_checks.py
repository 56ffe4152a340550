"""What only the device knows of packed sequences, looked at: it waits for the device."""

import torch
from torch import Tensor

from proxyattn.ops import DEFAULT_BLOCK_SIZE, check_list_entries


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
    op: str = "proxy_attention_varlen",
) -> tuple[Tensor, Tensor]:
    """Raises ValueError unless sequences and pages lie where tensors and capacities let them.

    The varlen functions run it on every call if ``PROXYATTN_CHECK=1`` is in the environment. For
    debugging: it waits for the device.

    Args:
        q, k, cu_seqlens_q, ..., seqused_k: as in :func:`proxyattn.proxy_attention_varlen`.
        op: what the error begins with.

    Returns:
        Queries and keys of each sequence, int32 ``[S]`` each.
    """
    q_lens = _packed_lengths(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    _check_first(
        q_lens > max_seqlen_q,
        lambda i: (
            f"{op}: cu_seqlens_q must give a sequence at most max_seqlen_q={max_seqlen_q} "
            f"queries, got {int(q_lens[i])} for sequence {i}"
        ),
    )
    if block_table is None:
        held = _packed_lengths(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0])
        if seqused_k is None:
            _check_first(
                held > max_seqlen_k,
                lambda i: (
                    f"{op}: cu_seqlens_k must give a sequence at most "
                    f"max_seqlen_k={max_seqlen_k} keys, got {int(held[i])} for sequence {i}"
                ),
            )
            return q_lens, held
    else:
        held = torch.full_like(seqused_k, block_table.shape[1] * k.shape[1])
    held = held.clamp(max=max_seqlen_k)
    _check_first(
        (seqused_k < 0) | (seqused_k > held),
        lambda i: (
            f"{op}: seqused_k must be in [0, {int(held[i])}], got seqused_k[{i}]="
            f"{int(seqused_k[i])}"
        ),
    )
    if block_table is not None:
        _check_pages(op, block_table, seqused_k, *k.shape[:2])
    return q_lens, seqused_k


def check_packed_lists(
    op: str,
    indices: Tensor,
    counts: Tensor,
    q_lens: Tensor,
    kv_lens: Tensor,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> None:
    """check_block_lists for the lists ``[L, R, C]`` and counts ``[Hq, R]`` of packed sequences.

    Query blocks behind the last sequence are not looked at.
    """
    rows = (q_lens + block_size - 1) // block_size
    blocks = ((kv_lens + block_size - 1) // block_size).repeat_interleave(rows)
    used = len(blocks)
    check_list_entries(op, indices[None, :, :used], counts[None, :, :used], blocks)


def _check_first(bad: Tensor, message) -> None:
    """Raises with the message about the first place that is bad."""
    places = bad.nonzero()
    if len(places):
        raise ValueError(message(*places[0].tolist()))


def _packed_lengths(op, name, starts, total):
    _check_first(
        (starts < 0) | (starts > total),
        lambda i: f"{op}: {name} must be in [0, {total}], got {name}[{i}]={int(starts[i])}",
    )
    _check_first(
        starts.diff() < 0,
        lambda i: (
            f"{op}: {name} must not decrease, got {name}[{i + 1}]={int(starts[i + 1])} "
            f"after {int(starts[i])}"
        ),
    )
    return starts.diff()


def _check_pages(op, block_table, kv_lens, num_pages, page_len):
    pages = torch.arange(block_table.shape[1], device=block_table.device)
    used = pages * page_len < kv_lens[:, None]
    _check_first(
        used & ((block_table < 0) | (block_table >= num_pages)),
        lambda i, j: (
            f"{op}: block_table must name pages in [0, {num_pages}), got "
            f"block_table[{i}, {j}]={int(block_table[i, j])}"
        ),
    )
