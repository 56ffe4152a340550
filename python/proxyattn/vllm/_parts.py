"""A step's plan as tensors: the arguments of the sparse call, and vLLM's metadata cut to some rows.

Everything is a slice of what vLLM put on the device, or computed there from it; nothing waits.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from proxyattn.vllm._plan import Span


@dataclass(frozen=True)
class SparsePart:
    """Arguments of :func:`proxyattn.proxy_attention_varlen` for the queries of ``tokens``."""

    tokens: slice
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Tensor
    seqused_k: Tensor


@dataclass(frozen=True)
class Parts:
    """What a layer's forward pass does: sparse calls, one as a rule, then vLLM's, dense."""

    sparse: tuple[SparsePart, ...]
    dense: tuple[tuple[slice, Any], ...]


def sparse_part(common, span: Span) -> SparsePart:
    """The sparse call of a span, from a ``CommonAttentionMetadata``."""
    rows = slice(*span.rows)
    keys = common.seq_lens[rows]
    if span.hidden:
        keys = keys * _shown(span, keys.device)
    return SparsePart(
        tokens=slice(*span.tokens),
        cu_seqlens_q=_starts(common.query_start_loc, span),
        max_seqlen_q=span.max_queries,
        max_seqlen_k=span.max_keys,
        block_table=common.block_table_tensor[rows],
        seqused_k=keys,
    )


def _starts(starts: Tensor, span: Span) -> Tensor:
    first, last = span.rows
    own = starts[first : last + 1]
    return own - span.tokens[0] if span.tokens[0] else own


def _shown(span: Span, device: torch.device) -> Tensor:
    """int32 ``[rows]``: 0 for hidden rows, 1 for others."""
    shown = [int(row not in span.hidden) for row in range(*span.rows)]
    # From pinned memory the copy doesn't wait.
    host = torch.tensor(shown, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


# Fields of CommonAttentionMetadata, of one version or another, that have an entry for each row,
# and those that keep what was computed from all rows.
_OF_ROWS = ("is_prefilling", "seq_lens_cpu_upper_bound", "req_idx")
_COMPUTED = (
    "_seq_lens_cpu",
    "_num_computed_tokens_cpu",
    "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
)


def dense_part(common, span: Span):
    """The ``CommonAttentionMetadata`` of a span's rows alone."""
    rows, tokens = slice(*span.rows), slice(*span.tokens)
    names = {field.name for field in fields(common)}
    changes = {name: None for name in _COMPUTED if name in names}
    for name in _OF_ROWS:
        if getattr(common, name, None) is not None:
            changes[name] = getattr(common, name)[rows]
    if getattr(common, "positions", None) is not None:
        changes["positions"] = common.positions[..., tokens]
    return replace(
        common,
        query_start_loc=_starts(common.query_start_loc, span),
        query_start_loc_cpu=_starts(common.query_start_loc_cpu, span),
        seq_lens=common.seq_lens[rows],
        num_reqs=span.rows[1] - span.rows[0],
        num_actual_tokens=span.tokens[1] - span.tokens[0],
        max_query_len=span.max_queries,
        max_seq_len=span.max_keys,
        block_table_tensor=common.block_table_tensor[rows],
        slot_mapping=common.slot_mapping[tokens],
        **changes,
    )
