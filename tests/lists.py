"""When chosen block lists count as right: they equal the reference's, except where the numbers that
decide are so close that rounding may turn them. Those rows are held to what defines them."""

import numpy as np

#: A coverage count may differ where a cumulative share is this close to the one to reach.
SHARE_MARGIN = 1e-5


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


def assert_counts(counts, expected, covered, targets, least):
    """Coverage counts, and whether each is exact or by property.

    counts [B, Hq, Mb] on any device, expected numpy. covered[b][h][m] holds the share of the first
    k = 0 ... V blocks, targets[b][h] the share to reach (2: all), least[m] the smallest count.
    """
    counts = counts.cpu().numpy()
    assert counts.shape == expected.shape
    num_close = 0
    for b, h, m in np.ndindex(counts.shape):
        count, shares, target = counts[b, h, m], covered[b][h][m], targets[b, h] - 1e-6
        visible = len(shares) - 1
        close = targets[b, h] <= 1 and np.abs(shares - target).min() <= SHARE_MARGIN
        if not close:
            assert count == expected[b, h, m], (
                f"batch {b}, head {h}, row {m}: {count} blocks, reference {expected[b, h, m]}"
            )
            continue
        num_close += 1
        assert least[m] <= count <= visible
        assert count == visible or shares[count] >= target - SHARE_MARGIN
        assert count == least[m] or shares[count - 1] < target + SHARE_MARGIN
    return num_close
