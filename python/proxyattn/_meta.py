"""Fake kernels: the shapes and dtypes of every op's outputs, for torch.compile and opcheck."""

import torch
from torch.library import register_fake


def _ceil_div(numerator, denominator):
    return (numerator + denominator - 1) // denominator


def _check_devices(op, **tensors):
    """One meta tensor among real ones brings a call here, past the checks of the kernels.

    The first tensor tells the device; one that is None is not looked at.
    """
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise TypeError(
                f"{op}: {name} must be on the device of {first_name}, {first.device}, "
                f"got {tensor.device}"
            )


@register_fake("proxyattn::pool_heads")
def _(q, k, num_proxy_heads, stride, pooling):
    _check_devices("pool_heads", q=q, k=k)

    def pooled(x, heads):
        return x.new_empty(x.shape[0], _ceil_div(x.shape[1], stride), heads, x.shape[3])

    return pooled(q, num_proxy_heads), pooled(k, min(num_proxy_heads, k.shape[2]))


@register_fake("proxyattn::score_blocks")
def _(q_proxy, k_proxy, q_len, kv_len, stride, block_size, causal, scale, with_mass, window=None):
    _check_devices("score_blocks", q_proxy=q_proxy, k_proxy=k_proxy)
    batch, _, groups, _ = q_proxy.shape
    shape = (batch, groups, _ceil_div(q_len, block_size), _ceil_div(kv_len, block_size))
    peak = q_proxy.new_empty(shape, dtype=torch.float32)
    return peak, q_proxy.new_empty(shape if with_mass else (0,), dtype=torch.float32)


@register_fake("proxyattn::estimate_budgets")
def _(q, k, *settings):
    _check_devices("estimate_budgets", q=q, k=k)
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.int32)


@register_fake("proxyattn::estimate_shares")
def _(q, k, *settings):
    _check_devices("estimate_shares", q=q, k=k)
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.float32)


@register_fake("proxyattn::select_blocks")
def _(peak, mass, needs, q_len, kv_len, num_heads, block_size, causal, budget_mode, *settings):
    used_mass = mass if budget_mode == "top_p" else None
    _check_devices("select_blocks", peak=peak, needs=needs, mass=used_mass)
    counts = peak.new_empty(peak.shape[0], num_heads, peak.shape[2], dtype=torch.int32)
    return peak.new_empty(peak.shape, dtype=torch.int32), counts


def _attention_outputs(q, return_lse):
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@register_fake("proxyattn::block_sparse_attention")
def _(
    q,
    k,
    v,
    indices,
    counts,
    block_size,
    causal,
    scale,
    return_lse,
    window=None,
    sink_logits=None,
):
    given = {"k": k, "v": v, "indices": indices, "counts": counts, "sink_logits": sink_logits}
    _check_devices("block_sparse_attention", q=q, **given)
    return _attention_outputs(q, return_lse)


@register_fake("proxyattn::choose_blocks")
def _(
    q,
    k,
    causal,
    scale,
    gamma,
    stride,
    pooling,
    block_size,
    num_proxy_heads,
    budget_mode,
    min_budget,
    num_sink_blocks,
    num_local_blocks,
    shares,
    *settings,
):
    _check_devices("choose_blocks", q=q, k=k, shares=shares)
    batch, q_len, q_heads, _ = q.shape
    rows = _ceil_div(q_len, block_size)
    blocks = _ceil_div(k.shape[1], block_size)
    counts = q.new_empty(batch, q_heads, rows, dtype=torch.int32)
    return q.new_empty(batch, num_proxy_heads, rows, blocks, dtype=torch.int32), counts


@register_fake("proxyattn::proxy_attention")
def _(
    q,
    k,
    v,
    causal,
    scale,
    gamma,
    stride,
    pooling,
    block_size,
    num_proxy_heads,
    budget_mode,
    min_budget,
    num_sink_blocks,
    num_local_blocks,
    shares,
    return_lse,
    max_workspace_bytes,
    window=None,
    sink_logits=None,
):
    _check_devices("proxy_attention", q=q, k=k, v=v, shares=shares, sink_logits=sink_logits)
    return _attention_outputs(q, return_lse)


def _check_packed_devices(
    op, q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, seqused_k, **others
):
    given = {"k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    given |= {"block_table": block_table, "seqused_k": seqused_k, **others}
    _check_devices(op, q=q, **given)


def _packed_rows(q, cu_seqlens_q, block_size):
    return q.shape[0] // block_size + cu_seqlens_q.shape[0] - 1


def _packed_outputs(q, return_lse, out):
    lse_shape = (q.shape[1], q.shape[0]) if return_lse else (0,)
    # What the caller brings is written, not returned.
    result = q.new_empty(q.shape) if out is None else q.new_empty(0, dtype=torch.float32)
    return result, q.new_empty(lse_shape, dtype=torch.float32)


@register_fake("proxyattn::block_sparse_attention_varlen")
def _(
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
    window=None,
    sink_logits=None,
):
    places = (cu_seqlens_q, cu_seqlens_k, block_table, seqused_k)
    others = {"indices": indices, "counts": counts, "out": out, "sink_logits": sink_logits}
    _check_packed_devices("block_sparse_attention_varlen", q, k, v, *places, **others)
    return _packed_outputs(q, return_lse, out)


@register_fake("proxyattn::choose_blocks_varlen")
def _(
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
    gamma,
    stride,
    pooling,
    block_size,
    num_proxy_heads,
    budget_mode,
    min_budget,
    num_sink_blocks,
    num_local_blocks,
    shares,
    *settings,
):
    places = (cu_seqlens_q, cu_seqlens_k, block_table, seqused_k)
    _check_packed_devices("choose_blocks_varlen", q, k, None, *places, shares=shares)
    rows = _packed_rows(q, cu_seqlens_q, block_size)
    blocks = _ceil_div(max_seqlen_k, block_size)
    counts = q.new_empty(q.shape[1], rows, dtype=torch.int32)
    return q.new_empty(num_proxy_heads, rows, blocks, dtype=torch.int32), counts


@register_fake("proxyattn::proxy_attention_varlen")
def _(
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
    gamma,
    stride,
    pooling,
    block_size,
    num_proxy_heads,
    budget_mode,
    min_budget,
    num_sink_blocks,
    num_local_blocks,
    shares,
    return_lse,
    max_workspace_bytes,
    out,
    window=None,
    sink_logits=None,
):
    places = (cu_seqlens_q, cu_seqlens_k, block_table, seqused_k)
    others = {"shares": shares, "out": out, "sink_logits": sink_logits}
    _check_packed_devices("proxy_attention_varlen", q, k, v, *places, **others)
    return _packed_outputs(q, return_lse, out)
