"""proxy_attention and choose_blocks by one call per stage, and what outputs must be for lists."""

import plain
import proxyattn
import torch
from reference import attention as reference
from tolerance import assert_close, assert_within, fp32_attention_errors, to_numpy


def random_inputs(device, q_len, kv_len, heads=(4, 2), dtype=torch.bfloat16, head_dim=64, batch=2):
    """Queries twice as long as usual, so that attention is far from even."""
    return [
        (torch.randn(batch, n, h, head_dim) * spread).to(dtype).to(device)
        for n, h, spread in ((q_len, heads[0], 2), (kv_len, heads[1], 1), (kv_len, heads[1], 1))
    ]


def scores_of(
    q,
    k,
    *,
    causal=True,
    scale=None,
    stride=4,
    pooling="mean",
    block_size=64,
    num_proxy_heads=None,
    with_mass=True,
    window=None,
):
    """Stages 1 and 2: (peak, mass)."""
    proxies = proxyattn.pool_heads(q, k, num_proxy_heads, stride, pooling)
    lengths = (q.shape[1], k.shape[1])
    settings = (stride, block_size, causal, scale, with_mass, window)
    return proxyattn.score_blocks(*proxies, *lengths, *settings)


def choose_by_stages(
    q,
    k,
    *,
    gamma,
    causal=True,
    scale=None,
    stride=4,
    pooling="mean",
    block_size=64,
    num_proxy_heads=None,
    budget_mode="top_p",
    min_budget=None,
    num_sink_blocks=1,
    num_local_blocks=1,
    shares=None,
):
    """Stages 1 to 4: (indices, counts)."""
    top_p = budget_mode == "top_p"
    forcing = (num_sink_blocks, num_local_blocks)
    peak, mass = scores_of(
        q,
        k,
        causal=causal,
        scale=scale,
        stride=stride,
        pooling=pooling,
        block_size=block_size,
        num_proxy_heads=num_proxy_heads,
        with_mass=top_p,
    )
    needs = shares
    if not top_p:
        mass, needs = None, proxyattn.estimate_budgets(q, k, gamma, block_size, causal, scale)
    elif shares is None:
        needs = proxyattn.estimate_shares(q, k, block_size, causal, scale, *forcing)
    return proxyattn.select_blocks(
        peak,
        mass,
        needs,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        block_size,
        causal,
        budget_mode,
        gamma,
        min_budget,
        *forcing,
    )


def attend(q, k, v, indices, counts, *, causal=True, scale=None, block_size=64, **_):
    """Stage 5: (out, lse)."""
    return proxyattn.block_sparse_attention(
        q, k, v, indices, counts, block_size, causal, scale, return_lse=True
    )


def assert_attends_to(out, lse, tensors, indices, counts, settings):
    """out and lse are right for these lists, by the reference."""
    q, k, v = (to_numpy(x) for x in tensors)
    causal, scale = settings.get("causal", True), settings.get("scale")
    block_size = settings.get("block_size", 64)
    want, want_lse = reference.block_sparse_attention(
        q, k, v, indices.cpu().numpy(), counts.cpu().numpy(), block_size, causal, scale
    )
    out_error, lse_error = fp32_attention_errors(q, k, v, want_lse, scale)
    assert_within(lse, want_lse, lse_error, "lse")
    if out.dtype == torch.float32:
        assert_within(out, want, out_error, "out")
        return
    seen = plain.seen_keys(indices, counts, q.shape[1], k.shape[1], block_size, causal)
    assert_close(out, want, plain.attention(*tensors, seen, scale), "out")
