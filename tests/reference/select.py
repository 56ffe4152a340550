"""Stage 4: one ranking per (proxy, query block), one prefix length per head."""

import numpy as np

from reference.grid import ceil_div, forced_blocks, visible_blocks

#: What is held may fall short of what is needed by so much.
SLACK = 1e-6
DEFAULT_MIN_BUDGET = {"top_p": 512, "last_block": 2048}


def rank_row(peaks, visible, forced):
    """The visible blocks of one row: forced first, then peak descending, ties to the later."""
    heights = np.where(np.isnan(peaks), np.inf, peaks)
    rest = [n for n in visible if n not in set(forced)]
    return list(forced) + sorted(rest, key=lambda n: (-heights[n], -n))


def needs_of(shares, gamma):
    """Part of the mass outside the forced blocks that a head needs; NaN of a NaN share."""
    shares = np.asarray(shares, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        needs = np.maximum(0.0, (gamma - shares) / (1.0 - shares))
    return np.where(shares == 1, 0.0, needs)


def held_parts(mass_row, ranking, num_forced):
    """Part of the mass outside the forced blocks in the first k = 0, 1, ... ranked ones of them;
    None where the row holds a NaN, ones where there is no such mass."""
    if np.isnan(mass_row[ranking]).any():
        return None
    held = np.concatenate([[0.0], np.cumsum(mass_row[ranking[num_forced:]])])
    return held / held[-1] if held[-1] > 0 else np.ones(len(held))


def top_p_count(held, need, num_forced, num_blocks, gamma):
    """Blocks of one row that a head takes, before the least number and clipping."""
    if gamma >= 1 or held is None or np.isnan(need):
        return num_blocks
    return num_forced + int(np.flatnonzero(held >= need - SLACK)[0])


def least_count(num_forced, num_blocks, min_budget, block_size):
    """Fewest blocks that any head takes of a row that sees num_blocks."""
    return min(max(1, num_forced, ceil_div(min_budget, block_size)), num_blocks)


def select_blocks(
    peak,
    mass,
    needs,
    q_len,
    kv_len,
    block_size,
    causal,
    budget_mode="top_p",
    gamma=None,
    min_budget=None,
    num_sink_blocks=1,
    num_local_blocks=1,
    window=None,
):
    """Returns indices [B, g, Mb, Nb] (-1 past the visible blocks) and counts [B, Hq, Mb].

    `needs` are shares with "top_p", which asks for gamma, and budgets with "last_block".
    """
    if min_budget is None:
        min_budget = DEFAULT_MIN_BUDGET[budget_mode]
    batch, groups, num_rows, num_kv_blocks = peak.shape
    q_heads = needs.shape[1]
    geometry = (q_len, kv_len, block_size, causal)
    indices = np.full((batch, groups, num_rows, num_kv_blocks), -1)
    counts = np.zeros((batch, q_heads, num_rows), dtype=np.int64)
    for b, c, m in np.ndindex(batch, groups, num_rows):
        blocks = visible_blocks(m, *geometry, window)
        visible = len(blocks)
        forced = forced_blocks(m, *geometry, num_sink_blocks, num_local_blocks, window)
        ranking = np.array(rank_row(peak[b, c, m], blocks, forced), dtype=np.int64)
        indices[b, c, m, :visible] = ranking
        least = least_count(len(forced), visible, min_budget, block_size)
        for h in range(c * (q_heads // groups), (c + 1) * (q_heads // groups)):
            count = needs[b, h]
            if budget_mode == "top_p":
                held = held_parts(mass[b, c, m], ranking, len(forced))
                need = needs_of(needs[b, h], gamma)
                count = top_p_count(held, need, len(forced), visible, gamma)
            counts[b, h, m] = min(max(count, least), visible)
    return indices, counts
