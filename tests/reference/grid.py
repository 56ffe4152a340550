"""Where queries stand, which key blocks a query block can see, and which of them are forced."""

import numpy as np


def ceil_div(numerator, denominator):
    return -(-numerator // denominator)


def positions(q_len, kv_len):
    """Position of every query, aligned bottom-right."""
    return np.arange(q_len) + (kv_len - q_len)


def visible_pairs(query_positions, key_positions, causal, window=None):
    """Boolean [queries, keys]: may this query see this key?"""
    behind = query_positions[:, None] - key_positions[None, :]
    if not causal:
        return np.ones(behind.shape, dtype=bool)
    return (behind >= 0) & (window is None or behind < window)


def visible_blocks(m, q_len, kv_len, block_size, causal, window=None):
    """The key blocks with a key that one of block m's queries can see, ascending."""
    queries = positions(q_len, kv_len)[m * block_size : (m + 1) * block_size]
    seen = visible_pairs(queries, np.arange(kv_len), causal, window).any(axis=0)
    return np.unique(np.flatnonzero(seen) // block_size)


def num_visible(m, q_len, kv_len, block_size, causal, window=None):
    """V[m]: how many those are."""
    return len(visible_blocks(m, q_len, kv_len, block_size, causal, window))


def forced_blocks(
    m, q_len, kv_len, block_size, causal, num_sink_blocks=1, num_local_blocks=1, window=None
):
    """Forced key blocks of query block m, in rank order: local from the latest down, then sinks."""
    visible = visible_blocks(m, q_len, kv_len, block_size, causal, window).tolist()
    forced = []
    if causal and num_local_blocks > 0:
        own = positions(q_len, kv_len)[m * block_size] // block_size
        forced = [n for n in reversed(visible) if n >= own - (num_local_blocks - 1)]
    return forced + [n for n in visible if n < num_sink_blocks and n not in forced]
