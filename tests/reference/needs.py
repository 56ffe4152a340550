"""Stage 3: what each head needs, from its attention in its last queries."""

import numpy as np

from reference.grid import ceil_div, forced_blocks, positions, visible_blocks, visible_pairs
from reference.score import log_softmax


def block_mass(q, k, block_size, causal, scale=None, window=None):
    """a[B, Hq, Nb]: mean probability in each key block over the last min(block_size, M) queries."""
    batch, q_len, q_heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    scale = 1 / np.sqrt(head_dim) if scale is None else scale
    first = q_len - min(block_size, q_len)
    at = positions(q_len, kv_len)[first:]
    # The key blocks that a query block of exactly these queries can see.
    exist = visible_blocks(0, q_len - first, kv_len, block_size, causal, window)
    visible = visible_pairs(at, np.arange(kv_len), causal)
    visible &= np.isin(np.arange(kv_len) // block_size, exist)
    num_kv_blocks = ceil_div(kv_len, block_size)
    a = np.zeros((batch, q_heads, num_kv_blocks))
    for b in range(batch):
        for h in range(q_heads):
            keys = k[b, :, h // (q_heads // kv_heads)]
            p = np.exp(log_softmax(scale * q[b, first:, h] @ keys.T, visible))
            for n in range(num_kv_blocks):
                cell = p[:, n * block_size : (n + 1) * block_size]
                a[b, h, n] = cell.sum(axis=1).mean()
    return a


def reached(a):
    """Part of sum(a) in the k largest blocks, for k = 0, 1, ..., Nb; last axis Nb + 1."""
    ordered = -np.sort(-a, axis=-1)
    total = a.sum(axis=-1, keepdims=True)
    zero = np.zeros((*a.shape[:-1], 1))
    return np.concatenate([zero, np.cumsum(ordered, axis=-1) / total], axis=-1)


def budgets_of(a, gamma):
    """Smallest k with a[0] + ... + a[k - 1] >= gamma * sum(a), a sorted descending."""
    num_kv_blocks = a.shape[-1]
    if gamma >= 1:
        return np.full(a.shape[:-1], num_kv_blocks)
    if gamma <= 0:
        return np.ones(a.shape[:-1], dtype=np.int64)
    enough = reached(a)[..., 1:] >= gamma
    budgets = np.where(enough.any(axis=-1), enough.argmax(axis=-1) + 1, num_kv_blocks)
    broken = ~(a.sum(axis=-1) > 0)
    return np.where(broken, num_kv_blocks, budgets)


def shares_of(a, forced):
    """Part of sum(a) in the forced blocks; NaN where the sum is not positive."""
    total = a.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, a[..., forced].sum(axis=-1) / total, np.nan)


def estimate_budgets(q, k, gamma, block_size, causal, scale=None, window=None):
    """int64 [B, Hq]."""
    if q.shape[1] == 0 or k.shape[1] == 0:
        return np.zeros((q.shape[0], q.shape[2]), dtype=np.int64)
    return budgets_of(block_mass(q, k, block_size, causal, scale, window), gamma)


def last_forced(
    q_len, kv_len, block_size, causal, num_sink_blocks=1, num_local_blocks=1, window=None
):
    """What is forced for a query block of exactly the last min(block_size, M) queries."""
    rows = min(block_size, q_len)
    return forced_blocks(
        0, rows, kv_len, block_size, causal, num_sink_blocks, num_local_blocks, window
    )


def estimate_shares(
    q, k, block_size, causal, scale=None, num_sink_blocks=1, num_local_blocks=1, window=None
):
    """float64 [B, Hq]."""
    q_len, kv_len = q.shape[1], k.shape[1]
    if q_len == 0 or kv_len == 0:
        return np.full((q.shape[0], q.shape[2]), np.nan)
    forced = last_forced(
        q_len, kv_len, block_size, causal, num_sink_blocks, num_local_blocks, window
    )
    return shares_of(block_mass(q, k, block_size, causal, scale, window), forced)
