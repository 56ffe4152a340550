"""Stage 2: log-probabilities of the windows, reduced over blocks."""

import numpy as np

from reference.grid import ceil_div, positions, visible_blocks, visible_pairs


def log_softmax(logits, visible):
    """Natural log-probabilities along the last axis; -inf where not visible."""
    masked = np.where(visible, logits, -np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        top = masked.max(axis=-1, keepdims=True)
        lse = top + np.log(np.exp(masked - top).sum(axis=-1, keepdims=True))
        return np.where(visible, masked - lse, -np.inf)


def score_blocks(
    q_proxy, k_proxy, q_len, kv_len, stride, block_size, causal, scale=None, rows=None, window=None
):
    """Returns (peak, mass), both [B, g, rows, Nb]; `rows` lists query blocks, None means all.

    Key blocks that are not visible don't exist; inside those that are a window hides nothing.
    """
    batch, _, proxies, head_dim = q_proxy.shape
    key_proxies = k_proxy.shape[2]
    scale = 1 / np.sqrt(head_dim) if scale is None else scale
    q_tokens = np.arange(0, q_len, stride)
    k_tokens = np.arange(0, kv_len, stride)
    rows = list(range(ceil_div(q_len, block_size)) if rows is None else rows)
    num_kv_blocks = ceil_div(kv_len, block_size)
    peak = np.full((batch, proxies, len(rows), num_kv_blocks), -np.inf)
    mass = np.zeros((batch, proxies, len(rows), num_kv_blocks))
    if kv_len == 0:
        return peak, mass
    for b in range(batch):
        for c in range(proxies):
            keys = k_proxy[b, :, c * key_proxies // proxies]
            for place, m in enumerate(rows):
                sampled = np.flatnonzero(q_tokens // block_size == m)
                at = positions(q_len, kv_len)[q_tokens[sampled]]
                logits = scale * q_proxy[b, sampled, c] @ keys.T
                exists = np.isin(
                    k_tokens // block_size,
                    visible_blocks(m, q_len, kv_len, block_size, causal, window),
                )
                log_p = log_softmax(logits, visible_pairs(at, k_tokens, causal) & exists)
                for n in range(num_kv_blocks):
                    cell = log_p[:, k_tokens // block_size == n]
                    peak[b, c, place, n] = cell.max()
                    mass[b, c, place, n] = np.exp(cell).sum(axis=1).mean()
    return peak, mass
