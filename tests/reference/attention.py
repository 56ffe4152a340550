"""Stage 5: exact attention of each query over its chosen key blocks."""

import numpy as np

from reference.grid import ceil_div, positions, visible_pairs


def _attend(q, k, v, scale, seen, sink=-np.inf):
    """q [r, D], k, v [n, D], seen [r, n] -> out [r, D], lse [r]. A sink is one more key, of this
    logit in each row, whose value is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        logits = np.where(seen, scale * q @ k.T, -np.inf)
        logits = np.append(logits, np.full((len(q), 1), sink), axis=1)
        values = np.append(v, np.zeros((1, v.shape[1])), axis=0)
        top = logits.max(axis=1, keepdims=True)
        top = np.where(np.isneginf(top), 0.0, top)  # a row that sees nothing
        weights = np.exp(logits - top)
        total = weights.sum(axis=1, keepdims=True)
        out = np.where(total == 0.0, 0.0, weights @ values / total)
        return out, (top + np.log(total))[:, 0]


def block_sparse_attention(
    q,
    k,
    v,
    indices,
    counts,
    block_size,
    causal,
    scale=None,
    rows=None,
    window=None,
    sink_logits=None,
):
    """Returns out [B, M, Hq, D] and lse [B, Hq, M].

    `rows` lists the query blocks to work out, None means all; the others stay zero.
    """
    sinks = np.full(q.shape[2], -np.inf) if sink_logits is None else sink_logits
    batch, q_len, q_heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    heads_per_list = q_heads // indices.shape[1]
    scale = 1 / np.sqrt(head_dim) if scale is None else scale
    key_blocks = np.arange(kv_len) // block_size
    out = np.zeros(q.shape)
    lse = np.full((batch, q_heads, q_len), -np.inf)
    for b in range(batch):
        for h in range(q_heads):
            keys, values = (x[b, :, h // (q_heads // kv_heads)] for x in (k, v))
            for m in range(ceil_div(q_len, block_size)) if rows is None else rows:
                chosen = indices[b, h // heads_per_list, m, : counts[b, h, m]]
                in_lists = np.flatnonzero(np.isin(key_blocks, chosen))
                row = slice(m * block_size, min((m + 1) * block_size, q_len))
                at = positions(q_len, kv_len)[row]
                out[b, row, h], lse[b, h, row] = _attend(
                    q[b, row, h],
                    keys[in_lists],
                    values[in_lists],
                    scale,
                    visible_pairs(at, in_lists, causal, window),
                    sinks[h],
                )
    return out, lse


def dense_attention(q, k, v, causal, scale=None, **settings):
    """The same with every key block chosen."""
    batch, q_len, q_heads, _ = q.shape
    lists = np.zeros((batch, 1, 1, 1), dtype=np.int64)
    counts = np.ones((batch, q_heads, 1), dtype=np.int64)
    one_block = max(q_len, k.shape[1], 1)
    return block_sparse_attention(q, k, v, lists, counts, one_block, causal, scale, **settings)
