"""When chosen block lists count as right: they equal the reference's, except where the numbers that
decide are so close that rounding may turn them. Those rows are held to what defines them."""

import numpy as np
from reference import select as reference
from reference.grid import forced_blocks, num_visible

#: Peaks this close may stand in either order.
PEAK_MARGIN = 1e-4
#: A top-p count may differ where a cumulative mass is this close to what is needed, as a part of
#: the mass outside the forced blocks.
MASS_MARGIN = 1e-5


def assert_same_lists(indices, expected):
    """indices [B, g, Mb, Nb] on any device, expected numpy."""
    indices = indices.cpu().numpy()
    assert indices.shape == expected.shape
    differing = np.argwhere((indices != expected).any(axis=-1))
    assert len(differing) == 0, (
        f"{len(differing)} rankings differ, first at {differing[0].tolist()}:\n"
        f"got       {indices[tuple(differing[0])].tolist()}\n"
        f"reference {expected[tuple(differing[0])].tolist()}"
    )


def assert_same_rankings(indices, expected, peak):
    """The same but for blocks whose peaks lie within the margin. indices [B, g, Mb, Nb] on any
    device, the others numpy."""
    indices, expected = indices.cpu().numpy(), expected.astype(int)
    assert np.array_equal(np.sort(indices, axis=-1), np.sort(expected, axis=-1))
    first, second = (np.take_along_axis(peak, np.maximum(x, 0), -1) for x in (indices, expected))
    moved = indices != expected
    assert np.abs(first[moved] - second[moved]).max(initial=0.0) <= PEAK_MARGIN


def assert_top_p_counts(
    counts,
    rankings,
    mass,
    shares,
    geometry,
    gamma,
    min_budget=0,
    num_sink_blocks=1,
    num_local_blocks=1,
    window=None,
):
    """Counts are those of the reference for these rankings, but for those within the margin, which
    must reach what is needed as one block less must not. Returns how many those are.

    counts [B, Hq, Mb] on any device, the others numpy: rankings and mass [B, g, Mb, Nb], shares
    [B, Hq]; geometry is (q_len, kv_len, block_size, causal).
    """
    counts = counts.cpu().numpy()
    assert counts.shape == (*shares.shape, rankings.shape[2])
    needs = reference.needs_of(shares, gamma)
    heads_per_proxy = counts.shape[1] // rankings.shape[1]
    num_close = 0
    for b, c, m in np.ndindex(rankings.shape[:3]):
        visible = num_visible(m, *geometry, window)
        forced = len(forced_blocks(m, *geometry, num_sink_blocks, num_local_blocks, window))
        least = reference.least_count(forced, visible, min_budget, geometry[2])
        held = reference.held_parts(mass[b, c, m], rankings[b, c, m, :visible], forced)
        for h in range(c * heads_per_proxy, (c + 1) * heads_per_proxy):
            count, need = counts[b, h, m], needs[b, h]
            where = f"batch {b}, head {h}, row {m}: {count} of {visible} blocks"
            decided = held is None or not 0 < need < 1 or gamma >= 1
            if decided or np.abs(held - (need - reference.SLACK)).min() > MASS_MARGIN:
                free = reference.top_p_count(held, need, forced, visible, gamma)
                want = min(max(free, least), visible)
                assert count == want, f"{where}, reference {want}"
                continue
            num_close += 1
            target, free = need - reference.SLACK, count - forced
            assert least <= count <= visible, where
            assert count == visible or held[free] >= target - MASS_MARGIN, where
            assert count == least or held[free - 1] < target + MASS_MARGIN, where
    return num_close
