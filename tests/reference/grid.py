"""Where queries stand, which key blocks a query block can see, and which of them are forced."""

import numpy as np


def ceil_div(numerator, denominator):
    return -(-numerator // denominator)


def positions(q_len, kv_len):
    """Position of every query, aligned bottom-right."""
    return np.arange(q_len) + (kv_len - q_len)


def visible_pairs(query_positions, key_positions, causal):
    """Boolean [queries, keys]: may this query see this key?"""
    shape = (len(query_positions), len(key_positions))
    if not causal:
        return np.ones(shape, dtype=bool)
    return key_positions[None, :] <= query_positions[:, None]


def num_visible(m, q_len, kv_len, block_size, causal):
    """V[m]: key blocks with a key that one of block m's queries can see."""
    queries = positions(q_len, kv_len)[m * block_size : (m + 1) * block_size]
    earliest_keys = np.arange(0, kv_len, block_size)
    return int(visible_pairs(queries, earliest_keys, causal).any(axis=0).sum())


def forced_blocks(m, q_len, kv_len, block_size, causal, num_sink_blocks=1, num_local_blocks=1):
    """Forced key blocks of query block m, in rank order: local from the latest down, then sinks."""
    visible = num_visible(m, q_len, kv_len, block_size, causal)
    forced = []
    if causal and num_local_blocks > 0:
        own = positions(q_len, kv_len)[m * block_size] // block_size
        earliest = max(0, own - (num_local_blocks - 1))
        forced = list(range(visible - 1, earliest - 1, -1))
    return forced + [n for n in range(min(num_sink_blocks, visible)) if n not in forced]
