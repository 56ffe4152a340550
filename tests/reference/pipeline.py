"""Stages 1 to 4 in a row, with the rounding that the formulas ask for between them."""

from reference.budget import estimate_budgets
from reference.pool import pool_heads
from reference.score import score_blocks
from reference.select import select_blocks


def choose_blocks(
    q,
    k,
    *,
    num_proxy_heads,
    round_to_dtype,
    causal=True,
    scale=None,
    gamma=0.95,
    stride=4,
    block_size=128,
    **selection,
):
    """Returns a dict of indices, counts, budgets, peak and mass.

    `round_to_dtype` rounds an array to the inputs' dtype.
    """
    q_len, kv_len = q.shape[1], k.shape[1]
    pooled = pool_heads(q, k, num_proxy_heads, stride)
    q_proxy, k_proxy = (round_to_dtype(x) for x in pooled)
    peak, mass = score_blocks(q_proxy, k_proxy, q_len, kv_len, stride, block_size, causal, scale)
    budgets = estimate_budgets(q, k, gamma, block_size, causal, scale)
    indices, counts = select_blocks(
        peak, mass, budgets, q_len, kv_len, block_size, causal, **selection
    )
    return {
        "indices": indices,
        "counts": counts,
        "budgets": budgets,
        "peak": peak,
        "mass": mass,
    }
