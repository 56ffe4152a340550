"""A layer's attention by the ops, recorded where recordings are open."""

import torch
from torch import Tensor

from proxyattn import varlen
from proxyattn._stages import Settings, run_stages
from proxyattn.hf._ops import Rule
from proxyattn.hf._packed import Packing
from proxyattn.hf._recording import Recording, SparseCall, open_recordings


def attend(
    q: Tensor, k: Tensor, v: Tensor, settings: Settings, rule: Rule, layer: int | None
) -> Tensor:
    """Every row one causal sequence: ``q [B, M, Hq, D]``, ``k, v [B, N, Hkv, D]`` to q's shape."""
    recordings = _recordings(rule)
    if not recordings:
        return settings.attend(q, k, v, *rule)
    stages = run_stages(q, k, v, settings, rule.scale, rule.sinks)
    call = SparseCall(
        layer=layer,
        q_len=q.shape[1],
        kv_len=k.shape[1],
        block_size=settings.block_size,
        counts=stages.counts,
        proxy_heads=stages.indices.shape[1],
    )
    for recording in recordings:
        recording.sparse.append(call)
    return stages.out


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    settings: Settings,
    rule: Rule,
    layer: int | None,
) -> Tensor:
    """The sequences of padded or packed rows; other queries get zeros. Shapes as in attend."""
    if not packing.q_lens:
        return torch.zeros_like(q)
    query, key, value = packing.queries.take(q), packing.keys.take(k), packing.keys.take(v)
    sequences = packing.sequences(q.device)
    recordings = _recordings(rule)
    if not recordings:
        out = varlen.proxy_attention_varlen(
            query,
            key,
            value,
            **sequences,
            scale=rule.scale,
            window=rule.window,
            sink_logits=rule.sinks,
            **settings.to_dict(),
        )
        return packing.queries.put(out, q)
    lists = varlen.choose_blocks_varlen(
        query, key, **sequences, scale=rule.scale, **settings.to_dict()
    )
    out, _ = varlen.block_sparse_attention_varlen(
        query,
        key,
        value,
        **sequences,
        indices=lists[0],
        counts=lists[1],
        block_size=settings.block_size,
        scale=rule.scale,
        sink_logits=rule.sinks,
    )
    for call in _calls(lists, packing, settings.block_size, layer):
        for recording in recordings:
            recording.sparse.append(call)
    return packing.queries.put(out, q)


def _recordings(rule: Rule) -> tuple[Recording, ...]:
    """Those that want to see which blocks are read; a window's are those that it touches."""
    return open_recordings() if rule.window is None else ()


def _calls(
    lists: tuple[Tensor, Tensor], packing: Packing, block_size: int, layer: int | None
) -> list[SparseCall]:
    indices, counts = lists
    num_rows = [-(-q_len // block_size) for q_len in packing.q_lens]
    by_sequence = counts[:, : sum(num_rows)].split(num_rows, dim=1)
    return [
        SparseCall(
            layer=layer,
            q_len=q_len,
            kv_len=kv_len,
            block_size=block_size,
            counts=rows[None],
            proxy_heads=indices.shape[0],
        )
        for q_len, kv_len, rows in zip(packing.q_lens, packing.kv_lens, by_sequence, strict=True)
    ]
