"""Stage 1: means over the heads of each proxy group, at the first token of every window."""

import numpy as np


def _pool(x, num_groups, stride):
    sampled = x[:, ::stride]
    batch, tokens, heads, head_dim = sampled.shape
    group_size = heads // num_groups
    pooled = np.zeros((batch, tokens, num_groups, head_dim))
    for c in range(num_groups):
        pooled[:, :, c] = sampled[:, :, c * group_size : (c + 1) * group_size].mean(axis=2)
    return pooled


def pool_heads(q, k, num_proxy_heads, stride):
    """q [B, M, Hq, D], k [B, N, Hkv, D] -> q_proxy, k_proxy [B, ceil(len / stride), g, D]."""
    return _pool(q, num_proxy_heads, stride), _pool(k, num_proxy_heads, stride)
