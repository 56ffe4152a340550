"""Stages 1 to 4 in a row, with the rounding that the formulas ask for between them."""

import numpy as np

from reference.needs import estimate_budgets, estimate_shares
from reference.pool import pool_heads
from reference.score import score_blocks
from reference.select import select_blocks


def choose_blocks(
    q,
    k,
    *,
    gamma,
    num_proxy_heads,
    round_to_dtype,
    causal=True,
    scale=None,
    stride=4,
    pooling="mean",
    block_size=64,
    budget_mode="top_p",
    num_sink_blocks=1,
    num_local_blocks=1,
    shares=None,
    min_budget=None,
    window=None,
):
    """Returns a dict of indices, counts, needs, peak and mass.

    `round_to_dtype` rounds an array to the inputs' dtype.
    """
    q_len, kv_len = q.shape[1], k.shape[1]
    forcing = (num_sink_blocks, num_local_blocks)
    pooled = pool_heads(q, k, num_proxy_heads, stride, pooling)
    q_proxy, k_proxy = (round_to_dtype(x) for x in pooled)
    peak, mass = score_blocks(
        q_proxy, k_proxy, q_len, kv_len, stride, block_size, causal, scale, window=window
    )
    needs = shares
    if budget_mode == "last_block":
        needs = estimate_budgets(q, k, gamma, block_size, causal, scale, window)
    elif shares is None:
        needs = estimate_shares(q, k, block_size, causal, scale, *forcing, window)
        needs = needs.astype(np.float32)
    indices, counts = select_blocks(
        peak,
        mass,
        needs,
        q_len,
        kv_len,
        block_size,
        causal,
        budget_mode,
        gamma,
        min_budget,
        *forcing,
        window,
    )
    return {"indices": indices, "counts": counts, "needs": needs, "peak": peak, "mass": mass}
