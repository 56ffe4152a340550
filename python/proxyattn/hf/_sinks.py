"""Attention sinks where blocks are not chosen: SDPA knows none, so they come as a key."""

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv


def sinks_of(arguments: dict, query: Tensor) -> Tensor | None:
    """The logits ``[Hq]`` of a model's learned sinks, which leave the arguments; None without any.

    Raises:
        ValueError: for sinks of another shape.
    """
    sinks = arguments.pop("s_aux", None)
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(
            f"proxyattn: s_aux must hold one logit for each of the {query.shape[1]} query heads, "
            f"got shape {list(sinks.shape)}"
        )
    return sinks


def attend_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor,
    is_causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """What SDPA gives if each row has one more key, of its head's logit and without a value.

    Args:
        query: ``[B, Hq, M, D]``.
        key, value: ``[B, Hkv, N, D]``.
        mask: as SDPA's, or None.
        sinks: ``[Hq]``.
        is_causal: whether without a mask query i sees the keys up to key i, as SDPA's; a single
            query sees all.
        scale: factor of the logits, but not of the sinks.
        dropout: probability.

    Returns:
        ``[B, M, Hq, D]``.
    """
    batch, q_heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    if mask is None:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
        mask = mask.tril() if is_causal and q_len > 1 else mask
    bias = mask
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    columns = sinks.to(query.dtype)[None, :, None, None].expand(batch, -1, q_len, 1)
    bias = torch.cat([bias.expand(batch, q_heads, q_len, kv_len), columns], dim=-1)
    groups = q_heads // key.shape[1]
    key, value = (
        torch.cat([repeat_kv(x, groups), x.new_zeros(batch, q_heads, 1, x.shape[3])], dim=2)
        for x in (key, value)
    )
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale
    )
    return out.transpose(1, 2).contiguous()
