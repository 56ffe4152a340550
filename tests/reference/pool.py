"""Stage 1: means over the heads of each proxy and over windows of tokens."""

import numpy as np


def _pool(x, num_groups, stride, pooling):
    batch, tokens, heads, head_dim = x.shape
    group_size = heads // num_groups
    window = {"mean": stride, "first": 1}[pooling]
    starts = range(0, tokens, stride)
    pooled = np.zeros((batch, len(starts), num_groups, head_dim))
    for place, start in enumerate(starts):
        for c in range(num_groups):
            cell = x[:, start : start + window, c * group_size : (c + 1) * group_size]
            pooled[:, place, c] = cell.mean(axis=(1, 2))
    return pooled


def pool_heads(q, k, num_proxy_heads, stride, pooling="mean"):
    """q [B, M, Hq, D], k [B, N, Hkv, D] -> q_proxy [B, ceil(M / stride), g, D] and
    k_proxy [B, ceil(N / stride), min(g, Hkv), D]."""
    key_proxies = min(num_proxy_heads, k.shape[2])
    return _pool(q, num_proxy_heads, stride, pooling), _pool(k, key_proxies, stride, pooling)
