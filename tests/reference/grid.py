"""Where queries stand and which key blocks a query block can see."""

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
