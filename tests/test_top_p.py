"""select_blocks by top-p: as many blocks of every row as hold what a head needs there."""

import proxyattn
import pytest
import torch
from reference.grid import forced_blocks
from scores import fp32, random_call, visible_blocks

NAN, INF = float("nan"), float("inf")


def top_p_counts(device, masses, shares, gamma, num_sink_blocks=0, min_budget=0):
    """Counts of every head in every row, non-causal, ranked from the first block to the last."""
    num_rows, num_blocks = len(masses), len(masses[0])
    peak = -torch.arange(num_blocks, dtype=torch.float32, device=device)
    indices, counts = proxyattn.select_blocks(
        peak.expand(1, 1, num_rows, num_blocks),
        fp32([[masses]], device),
        fp32([shares], device),
        64 * num_rows,
        64 * num_blocks,
        len(shares),
        causal=False,
        gamma=gamma,
        min_budget=min_budget,
        num_sink_blocks=num_sink_blocks,
    )
    assert indices[0, 0].tolist() == [list(range(num_blocks))] * num_rows
    return counts[0].tolist()


def test_literal_top_p(device):
    """Nothing is forced, so shares are 0: what gamma asks for, exact ties included."""
    row = [0.5, 0.25, 0.125, 0.125]
    for gamma, count in {
        -INF: 1,
        -0.5: 1,
        0.0: 1,
        0.1: 1,
        0.5: 1,
        0.51: 2,
        0.75: 2,
        0.76: 3,
        0.875: 3,
        0.88: 4,
        0.99: 4,
        1.0: 4,
        INF: 4,
    }.items():
        assert top_p_counts(device, [row], [0.0], gamma) == [[count]], gamma


def test_literal_top_p_slack(device):
    """A millionth less than what is needed will do, and no more."""
    for short, count in [(0, 1), (5e-7, 1), (2e-6, 2)]:
        row = [0.5 - short, 0.25 + short, 0.25]
        assert top_p_counts(device, [row], [0.0], 0.5) == [[count]], short
    # Of the mass outside the forced blocks, not of the row's: here that is a hundredth.
    for short, count in [(0, 2), (5e-9, 2), (2e-8, 3)]:
        row = [0.99, 0.005 - short, 0.005 + short]
        assert top_p_counts(device, [row], [0.0], 0.5, num_sink_blocks=1) == [[count]], short


def test_literal_needs(device):
    """(.75 - share) / (1 - share) of what is not forced, here block 0: shares of 0, .5, .75 and
    above need .75, .5, 0 and 0 of the masses 4, 2, 1, 1 (of 8), whatever block 0 holds."""
    shares = [0.0, 0.5, 0.6875, 0.75, 0.8, 1.0, NAN]
    counts = [3, 2, 2, 1, 1, 1, 5]  # .2 of it for the third
    for first in (0.0, 1.0, 1000.0):
        row = [first, 4.0, 2.0, 1.0, 1.0]
        got = top_p_counts(device, [row], shares, 0.75, num_sink_blocks=1)
        assert got == [[count] for count in counts]
        assert top_p_counts(device, [row], shares, 1.0, num_sink_blocks=1) == [[5]] * 7
        # No need of any: what is forced, and all where nobody knows.
        for gamma in (0.0, -1.0):
            got = top_p_counts(device, [row], shares, gamma, num_sink_blocks=1)
            assert got == [[1]] * 6 + [[5]]
    assert top_p_counts(device, [row], shares[:6], 0.75, 1, min_budget=65) == [
        [3],
        [2],
        [2],
        [2],
        [2],
        [2],
    ]


def test_literal_rows_have_counts_of_their_own(device):
    """Two heads, of shares 0 and .5, at gamma .75."""
    rows = [
        [9.0, 8.0, 0.0, 0.0],
        [9.0, 4.0, 4.0, 0.0],
        [9.0, 3.0, 3.0, 2.0],
        [9.0, 0.0, 0.0, 0.0],  # nothing that is not forced
        [0.0, 0.0, 0.0, 0.0],
        [9.0, 0.0, 0.0, 1.0],
    ]
    assert top_p_counts(device, rows, [0.0, 0.5], 0.75, num_sink_blocks=1) == [
        [2, 3, 3, 1, 1, 4],
        [2, 2, 3, 1, 1, 4],
    ]
    # Unforced, a row without mass still takes one block.
    assert top_p_counts(device, rows[3:5], [0.0, 0.5], 0.75) == [[1, 1], [1, 1]]


def test_literal_nan_in_mass(device):
    """In a forced block, in a free one: the row is read whole, also where nothing is needed."""
    row = [4.0, 2.0, 1.0, 1.0]
    rows = [row, [NAN, *row[1:]], [*row[:2], NAN, 1.0], [*row[:3], NAN], [NAN, 0.0, 0.0, 0.0]]
    for gamma in (0.75, 0.0):
        counts = top_p_counts(device, rows, [0.9, 1.0], gamma, num_sink_blocks=1)
        assert counts == [[1, 4, 4, 4, 4]] * 2


def test_literal_nan_in_invisible_mass(device):
    """Row m of a causal call sees blocks 0 to m; the third row's NaN is its own."""
    peak = torch.zeros(1, 1, 4, 4, device=device)
    mass = fp32([[[[1, NAN, NAN, NAN], [1, 2, NAN, NAN], [1, NAN, 1, NAN], [4, 3, 1, 1]]]], device)
    _, counts = proxyattn.select_blocks(
        peak, mass, fp32([[1.0, 0.0]], device), 256, 256, 2, gamma=0.5, min_budget=0
    )
    # Forced are the own block and the first; ties of peaks go to the later.
    assert counts[0].tolist() == [[1, 2, 3, 2], [1, 2, 3, 4]]


def test_literal_top_p_follows_the_ranking_of_its_proxy(device):
    """Heads 0 and 1 are of proxy 0, 2 and 3 of proxy 1; shares are each head's own."""
    peak = fp32([[[[-1.0, -2.0, -3.0]] * 2, [[-3.0, -2.0, -1.0]] * 2]], device)
    mass = fp32([[[[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]] * 2], device)
    indices, counts = proxyattn.select_blocks(
        peak,
        mass,
        fp32([[0.0, 0.5, 0.0, 0.5]], device),
        128,
        192,
        4,
        causal=False,
        gamma=0.75,
        min_budget=0,
        num_sink_blocks=0,
    )
    assert indices[0, 0].tolist() == [[0, 1, 2]] * 2
    assert indices[0, 1].tolist() == [[2, 1, 0]] * 2
    # In proxy 0 the first one, two and three blocks hold .25, .75, 1 and .5, .75, 1; in proxy 1
    # .25, .75, 1 and .25, .5, 1. Heads need .75 and .5.
    assert counts[0].tolist() == [[2, 2], [2, 1], [2, 3], [2, 2]]


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_counts_reach_the_need_and_one_block_less_does_not(device, sinks):
    (peak, mass, shares), call, settings = random_call(device, causal=False)
    settings["num_sink_blocks"] = sinks
    indices, counts = proxyattn.select_blocks(peak, mass, shares, *call, **settings)
    free = mass.double().gather(-1, indices.long())[..., sinks:].repeat_interleave(2, dim=1)
    held = torch.cat([torch.zeros_like(free[..., :1]), free.cumsum(-1)], -1)
    held = held / held[..., -1:]
    shares = shares.double()[..., None]
    need = ((0.7 - shares) / (1 - shares)).clamp(min=0)
    taken = (counts.long() - sinks)[..., None]
    assert (held.gather(-1, taken)[..., 0] >= need - 1e-6 - 1e-7).all()
    before = held.gather(-1, (taken - 1).clamp(min=0))[..., 0]
    fewest = counts == max(1, sinks)
    assert ((before < need - 1e-6 + 1e-7) | fewest).all()
    assert not fewest.all()


def test_nan_mass_takes_all_blocks_of_its_row(device):
    """And of no other, whichever it is."""
    (peak, mass, shares), call, settings = random_call(device)
    settings["gamma"] = 0.3
    _, clean = proxyattn.select_blocks(peak, mass, shares, *call, **settings)
    visible = visible_blocks(call, device)
    for m in (2, 10):
        mass[1, 1, m, 4] = NAN
        assert (clean[1, 2:4, m] < visible[m]).all()
        clean[1, 2:4, m] = visible[m]
    _, counts = proxyattn.select_blocks(peak, mass, shares, *call, **settings)
    assert torch.equal(counts, clean)


def test_mass_need_not_sum_to_one(device):
    """Parts are of the row's own sum."""
    (peak, mass, shares), call, settings = random_call(device)
    _, before = proxyattn.select_blocks(peak, mass, shares, *call, **settings)
    scale = torch.tensor([2.0 ** (m - 5) for m in range(11)], device=device)[:, None]
    _, after = proxyattn.select_blocks(peak, mass * scale, shares, *call, **settings)
    assert torch.equal(before, after)


def test_forced_mass_does_not_matter(device):
    """What the proxy puts on blocks that are read anyway."""
    (peak, mass, shares), call, settings = random_call(device)
    indices, before = proxyattn.select_blocks(peak, mass, shares, *call, **settings)
    for m in range(11):
        forced = forced_blocks(m, 700, 1500, 64, True)
        assert indices[0, 0, m, : len(forced)].tolist() == forced
        mass[:, :, m, forced] = 7.0
    _, after = proxyattn.select_blocks(peak, mass, shares, *call, **settings)
    assert torch.equal(before, after)


def test_rows_are_independent(device):
    """Rows of a batch entry of their own, seen as a chunk that ends where they do, are taken as
    they are in the whole. Masses are multiples of 2^-8, so that sums are exact in any order."""
    (peak, mass, shares), call, settings = random_call(device, q_len=704, kv_len=1536)
    mass = (mass * 4096).round() / 256
    whole, counts = proxyattn.select_blocks(peak, mass, shares, *call, **settings)
    for begin, end in [(0, 1), (1, 6), (6, 11)]:
        blocks = end + 13  # 832 tokens before query 0
        part = [x[1:, :, begin:end, :blocks] for x in (peak, mass)]
        lengths = (64 * (end - begin), 64 * blocks)
        got, taken = proxyattn.select_blocks(*part, shares[1:], *lengths, *call[2:], **settings)
        assert torch.equal(got, whole[1:, :, begin:end, :blocks])
        assert torch.equal(taken, counts[1:, :, begin:end])
