"""Stage 4: one ranking per (group, query block), one prefix length per head."""

import numpy as np

from reference.grid import ceil_div, num_visible, positions


def forced_blocks(m, q_len, kv_len, block_size, causal, num_sink_blocks, num_local_blocks):
    """Forced key blocks of query block m, in rank order: local from the latest down, then sinks."""
    visible = num_visible(m, q_len, kv_len, block_size, causal)
    forced = []
    if causal and num_local_blocks > 0:
        own = positions(q_len, kv_len)[m * block_size] // block_size
        earliest = max(0, own - (num_local_blocks - 1))
        forced = list(range(visible - 1, earliest - 1, -1))
    return forced + [n for n in range(min(num_sink_blocks, visible)) if n not in forced]


def rank_row(peaks, forced):
    """All visible blocks of one row: forced first, then peak descending, ties to the later."""
    heights = np.where(np.isnan(peaks), np.inf, peaks)
    rest = [n for n in range(len(peaks)) if n not in set(forced)]
    return list(forced) + sorted(rest, key=lambda n: (-heights[n], -n))


def ranked_shares(mass_row, ranking):
    """Share of the row's mass in its first k ranked blocks, for k = 0, 1, ..., V."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.concatenate([[0.0], np.cumsum(mass_row[ranking]) / mass_row[ranking].sum()])


def coverage_targets(peak, mass, budgets, q_len, kv_len, block_size, causal, sinks, local):
    """c[B, Hq], the share that each head's budget covers in the last row; 2 means all blocks."""
    batch, groups, num_rows, _ = peak.shape
    q_heads = budgets.shape[1]
    last = num_rows - 1
    visible = num_visible(last, q_len, kv_len, block_size, causal)
    forced = forced_blocks(last, q_len, kv_len, block_size, causal, sinks, local)
    targets = np.zeros((batch, q_heads))
    for b in range(batch):
        for h in range(q_heads):
            c = h // (q_heads // groups)
            ranking = rank_row(peak[b, c, last, :visible], forced)
            covered = ranked_shares(mass[b, c, last, :visible], ranking)
            all_blocks = budgets[b, h] >= visible
            targets[b, h] = 2.0 if all_blocks else covered[max(0, budgets[b, h])]
    return targets


def _coverage_count(target, covered):
    reached = np.flatnonzero(covered >= target - 1e-6)
    return int(reached[0]) if len(reached) else len(covered) - 1


def select_blocks(
    peak,
    mass,
    budgets,
    q_len,
    kv_len,
    block_size,
    causal,
    budget_mode="last_block",
    min_budget=None,
    num_sink_blocks=1,
    num_local_blocks=1,
):
    """Returns indices [B, g, Mb, Nb] (-1 past the visible blocks) and counts [B, Hq, Mb]."""
    if min_budget is None:
        min_budget = {"last_block": 2048, "coverage": 1024}[budget_mode]
    batch, groups, num_rows, num_kv_blocks = peak.shape
    q_heads = budgets.shape[1]
    least = ceil_div(min_budget, block_size)
    geometry = (q_len, kv_len, block_size, causal)
    if budget_mode == "coverage" and peak.size:
        targets = coverage_targets(
            peak, mass, budgets, *geometry, num_sink_blocks, num_local_blocks
        )
    indices = np.full((batch, groups, num_rows, num_kv_blocks), -1)
    counts = np.zeros((batch, q_heads, num_rows), dtype=np.int64)
    for m in range(num_rows):
        visible = num_visible(m, *geometry)
        forced = forced_blocks(m, *geometry, num_sink_blocks, num_local_blocks)
        for b in range(batch):
            for c in range(groups):
                indices[b, c, m, :visible] = rank_row(peak[b, c, m, :visible], forced)
            for h in range(q_heads):
                c = h // (q_heads // groups)
                count = budgets[b, h]
                if budget_mode == "coverage" and visible:
                    row = mass[b, c, m, :visible]
                    count = _coverage_count(
                        targets[b, h], ranked_shares(row, indices[b, c, m, :visible])
                    )
                count = max(count, least, 1, len(forced))
                counts[b, h, m] = min(count, visible)
    return indices, counts
