"""Stage 3: how many key blocks hold a share gamma of a head's attention in its last queries."""

import numpy as np

from reference.grid import ceil_div, positions, visible_pairs
from reference.score import log_softmax


def block_mass(q, k, block_size, causal, scale=None):
    """a[B, Hq, Nb]: mean probability in each key block over the last min(block_size, M) queries."""
    batch, q_len, q_heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    scale = 1 / np.sqrt(head_dim) if scale is None else scale
    first = q_len - min(block_size, q_len)
    at = positions(q_len, kv_len)[first:]
    visible = visible_pairs(at, np.arange(kv_len), causal)
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


def shares(a):
    """Share of sum(a) in the k largest blocks, for k = 0, 1, ..., Nb; last axis Nb + 1."""
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
    reached = shares(a)[..., 1:] >= gamma
    budgets = np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1, num_kv_blocks)
    broken = ~(a.sum(axis=-1) > 0)
    return np.where(broken, num_kv_blocks, budgets)


def estimate_budgets(q, k, gamma, block_size, causal, scale=None):
    """int64 [B, Hq]."""
    if q.shape[1] == 0 or k.shape[1] == 0:
        return np.zeros((q.shape[0], q.shape[2]), dtype=np.int64)
    return budgets_of(block_mass(q, k, block_size, causal, scale), gamma)
