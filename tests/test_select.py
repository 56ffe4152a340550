"""select_blocks: one ranking per proxy and query block, one prefix length per head."""

from math import ceil

import numpy as np
import proxyattn
import pytest
import torch
from lists import assert_same_lists
from proxyattn.ops import DEFAULT_GAMMA
from reference import select as reference
from scores import MODES, NEEDS_DTYPE, fp32, int32, random_call, visible_blocks

NAN, INF = float("nan"), float("inf")


def select_one_row(device, peaks, budgets, **settings):
    """One query block of a non-causal call over blocks of 64, by budgets: (ranking, counts)."""
    settings = {"budget_mode": "last_block", "min_budget": 0, "num_sink_blocks": 0, **settings}
    indices, counts = proxyattn.select_blocks(
        fp32([[[peaks]]], device),
        None,
        int32([budgets], device),
        1,
        64 * len(peaks),
        len(budgets),
        causal=False,
        **settings,
    )
    assert indices.dtype == counts.dtype == torch.int32
    return indices[0, 0, 0].tolist(), counts[0, :, 0].tolist()


def test_literal_order(device):
    ranking, counts = select_one_row(device, [-3.0, -1.0, -4.0, -2.0], [1, 3])
    assert ranking == [1, 3, 0, 2]
    assert counts == [1, 3]


def test_literal_ties_go_to_the_later_block(device):
    peaks = [-2.0, -1.0, -2.0, -1.0, -2.0]
    assert select_one_row(device, peaks, [2])[0] == [3, 1, 4, 2, 0]
    assert select_one_row(device, [0.0, -0.0, 0.0, -0.0], [2])[0] == [3, 2, 1, 0]
    assert select_one_row(device, [-INF] * 3, [2])[0] == [2, 1, 0]


def test_literal_special_peaks(device):
    """NaN ranks as +inf, the later first; -inf last."""
    peaks = [0.0, NAN, -INF, INF, NAN, -1.0]
    assert select_one_row(device, peaks, [1])[0] == [4, 3, 1, 0, 5, 2]
    assert select_one_row(device, [-NAN, 5.0, NAN], [1])[0] == [2, 0, 1]


@pytest.mark.parametrize("num_blocks", [100, 700, 9000])
def test_peaks_of_all_magnitudes(device, num_blocks):
    """Rows that differ in every bit of the peaks, in the lowest alone and in none."""
    rng = np.random.default_rng(num_blocks)
    wide = rng.choice([-1.0, 1.0], num_blocks) * 2.0 ** rng.uniform(-125, 125, num_blocks)
    narrow = -17.0 - 2.0**-19 * rng.integers(0, 16, num_blocks)
    for peaks in (wide, narrow, np.full(num_blocks, -3.25)):
        peaks = peaks.astype(np.float32)
        ranking, _ = select_one_row(device, peaks.tolist(), [1])
        assert ranking == sorted(range(num_blocks), key=lambda i: (-peaks[i], -i))


def test_literal_sinks_come_first(device):
    peaks = [-9.0, -8.0, -1.0, -2.0]
    ranking, counts = select_one_row(device, peaks, [1, 3], num_sink_blocks=2)
    assert ranking == [0, 1, 2, 3]
    assert counts == [2, 3]
    assert select_one_row(device, peaks, [1], num_sink_blocks=99) == ([0, 1, 2, 3], [4])


def test_literal_min_budget(device):
    """In tokens, rounded up to blocks, clipped to the visible ones."""
    peaks = [-1.0, -2.0, -3.0, -4.0]
    for min_budget, count in [(0, 1), (1, 1), (64, 1), (65, 2), (192, 3), (193, 4), (10**9, 4)]:
        assert select_one_row(device, peaks, [1], min_budget=min_budget)[1] == [count]
    assert select_one_row(device, peaks, [0], min_budget=0)[1] == [1]


def causal_rows(device, num_blocks, peak, budgets, **settings):
    """Equal query and key blocks of 64 tokens: (rankings, counts)."""
    settings = {"budget_mode": "last_block", "min_budget": 0, **settings}
    length = 64 * num_blocks
    heads = len(budgets)
    indices, counts = proxyattn.select_blocks(
        fp32([[peak]], device), None, int32([budgets], device), length, length, heads, **settings
    )
    return indices[0, 0].tolist(), counts[0].tolist()


def test_literal_forced_blocks(device):
    """The query's own block, then block 0, then by peak; -1 where nothing is visible."""
    peak = [
        [-1.0, -INF, -INF, -INF],
        [-1.0, -2.0, -INF, -INF],
        [-1.0, -3.0, -2.0, -INF],
        [-4.0, -1.0, -3.0, -2.0],
    ]
    rankings, counts = causal_rows(device, 4, peak, [1, 3])
    assert rankings == [[0, -1, -1, -1], [1, 0, -1, -1], [2, 0, 1, -1], [3, 0, 1, 2]]
    assert counts == [[1, 2, 2, 2], [1, 2, 3, 3]]

    rankings, counts = causal_rows(device, 4, peak, [1], num_sink_blocks=0, num_local_blocks=2)
    assert rankings == [[0, -1, -1, -1], [1, 0, -1, -1], [2, 1, 0, -1], [3, 2, 1, 0]]
    assert counts == [[1, 2, 2, 2]]

    rankings, counts = causal_rows(device, 4, peak, [1], num_sink_blocks=0, num_local_blocks=0)
    assert rankings == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 2, 1, -1], [1, 3, 2, 0]]
    assert counts == [[1, 1, 1, 1]]

    rankings, counts = causal_rows(device, 4, peak, [1], num_sink_blocks=2, num_local_blocks=1)
    assert rankings[3] == [3, 0, 1, 2] and counts[0] == [1, 2, 3, 3]

    rankings, counts = causal_rows(device, 4, peak, [1], num_sink_blocks=9, num_local_blocks=9)
    assert rankings[3] == [3, 2, 1, 0] and counts[0] == [1, 2, 3, 4]


def test_literal_query_block_across_two_key_blocks(device):
    """100 queries after 60 keys: block 0 stands at 60..123, block 1 at 124..159 of three blocks."""
    peak = fp32([[[[-1.0, -2.0, -INF], [-1.0, -2.0, -3.0]]]], device)
    indices, counts = proxyattn.select_blocks(
        peak, peak.exp(), fp32([[1]], device), 100, 160, 1, min_budget=0, num_sink_blocks=0
    )
    # Block 0 reaches into key block 1 and begins in key block 0: both are local.
    assert indices[0, 0].tolist() == [[1, 0, -1], [2, 1, 0]]
    assert counts[0, 0].tolist() == [2, 2]


def test_literal_defaults(device):
    """512 tokens, 8 blocks of 64, in our mode, which is the default; 2048, 32 blocks, in the
    paper's. gamma is the mode's own."""
    peak = torch.zeros(1, 1, 1, 40, device=device)
    mass = torch.full((1, 1, 1, 40), 1 / 40, device=device)
    _, counts = proxyattn.select_blocks(
        peak, None, int32([[1]], device), 1, 64 * 40, 1, causal=False, budget_mode="last_block"
    )
    assert counts.item() == 32
    for shares, count in [([[1.0]], 8), ([[0.0]], 1 + ceil(39 * DEFAULT_GAMMA["top_p"]))]:
        _, counts = proxyattn.select_blocks(
            peak, mass, fp32(shares, device), 1, 64 * 40, 1, causal=False
        )
        assert counts.item() == count
    assert DEFAULT_GAMMA["last_block"] == 0.95 and DEFAULT_GAMMA["top_p"] in (0.8, 0.85, 0.9, 0.95)


@pytest.mark.parametrize("mode", MODES)
def test_every_ranking_is_a_permutation_of_the_visible_blocks(device, mode):
    tensors, call, settings = random_call(device, mode)
    tensors[0][torch.rand(tensors[0].shape).to(device) < 0.2] = NAN
    indices, counts = proxyattn.select_blocks(*tensors, *call, **settings)
    for m, visible in enumerate(visible_blocks(call, device).tolist()):
        places = torch.arange(visible, device=device).expand(2, 3, visible)
        assert torch.equal(indices[:, :, m, :visible].sort(-1).values.long(), places)
        assert (indices[:, :, m, visible:] == -1).all()
        assert (counts[:, :, m] >= 1).all() and (counts[:, :, m] <= visible).all()


@pytest.mark.parametrize("mode", MODES)
def test_more_need_more_blocks(device, mode):
    """Within a proxy, heads take nested prefixes: the greater its budget, or the less of its
    attention the forced blocks hold, or the higher gamma, the more a head takes."""
    (peak, mass, needs), call, settings = random_call(device, mode, heads=(6, 1))
    needs = needs.sort(-1, descending=mode == "top_p").values
    _, counts = proxyattn.select_blocks(peak, mass, needs, *call, **settings)
    assert (counts[:, :-1] <= counts[:, 1:]).all() and (counts[:, 0] < counts[:, -1]).any()
    settings["gamma"] = 0.8
    _, more = proxyattn.select_blocks(peak, mass, needs, *call, **settings)
    if mode == "top_p":
        assert (counts <= more).all() and (counts < more).any()
    else:  # it is in the budgets already
        assert torch.equal(counts, more)


def test_budget_of_all_blocks_is_dense(device):
    tensors, call, settings = random_call(device, "last_block")
    tensors[2].fill_(24)
    _, counts = proxyattn.select_blocks(*tensors, *call, **settings)
    assert torch.equal(counts, visible_blocks(call, device).expand_as(counts))


@pytest.mark.parametrize("mode", MODES)
def test_hidden_blocks_do_not_matter(device, mode):
    """Whatever stands in the scores of blocks past the visible ones."""
    (peak, mass, needs), call, settings = random_call(device, mode)
    before = proxyattn.select_blocks(peak, mass, needs, *call, **settings)
    hidden = peak == -INF
    peak, mass = peak.masked_fill(hidden, 3e38), mass.masked_fill(hidden, NAN)
    after = proxyattn.select_blocks(peak, mass, needs, *call, **settings)
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mode", MODES)
def test_non_contiguous_scores(device, mode):
    tensors, call, settings = random_call(device, mode)
    want = proxyattn.select_blocks(*tensors, *call, **settings)
    strided = [
        x.transpose(0, 1).contiguous().transpose(0, 1)
        if x.dim() == 2
        else x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        for x in tensors
    ]
    got = proxyattn.select_blocks(*strided, *call, **settings)
    for first, second in zip(got, want, strict=True):
        assert torch.equal(first, second)


def test_budgets_need_no_mass(device):
    """It is not even looked at."""
    (peak, mass, budgets), call, settings = random_call(device, "last_block")
    want = proxyattn.select_blocks(peak, None, budgets, *call, **settings)
    for unused in (mass, mass * NAN, mass[0, 0, 0].int()):
        got = proxyattn.select_blocks(peak, unused, budgets, *call, **settings)
        for first, second in zip(got, want, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("mode", MODES)
def test_same_lists_every_time(device, mode, set_threads):
    tensors, call, settings = random_call(device, mode, 3000, 5000)
    first = proxyattn.select_blocks(*tensors, *call, **settings)
    for threads in (1, 2, 3):
        set_threads(threads)
        again = proxyattn.select_blocks(*tensors, *call, **settings)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len", "causal"),
    [(0, 100, 200, True), (2, 0, 200, True), (2, 0, 0, True), (2, 100, 0, False)],
)
def test_empty(device, mode, batch, q_len, kv_len, causal):
    num_rows, num_blocks = -(-q_len // 64), -(-kv_len // 64)
    scores = torch.zeros(batch, 2, num_rows, num_blocks, device=device)
    needs = torch.zeros(batch, 4, dtype=NEEDS_DTYPE[mode], device=device)
    indices, counts = proxyattn.select_blocks(
        scores, scores, needs, q_len, kv_len, 4, 64, causal, mode
    )
    assert indices.shape == scores.shape
    assert counts.shape == (batch, 4, num_rows)
    assert (counts == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_extreme_settings(device, mode):
    """The largest integers mean all; the extremes of needs the most or the fewest."""
    (peak, mass, needs), call, settings = random_call(device, mode)
    visible = visible_blocks(call, device)
    for name in ("min_budget", "num_sink_blocks", "num_local_blocks"):
        changed = {**settings, name: 2**63 - 1}
        _, counts = proxyattn.select_blocks(peak, mass, needs, *call, **changed)
        assert torch.equal(counts, visible.expand_as(counts)), name
    settings |= {"num_sink_blocks": 0, "num_local_blocks": 0}
    extremes = {"last_block": (2**31 - 1, -(2**31)), "top_p": (NAN, 1.0)}[mode]
    for value, want in zip(extremes, (visible, int32([1] * 11, device)), strict=True):
        needs.fill_(value)
        _, counts = proxyattn.select_blocks(peak, mass, needs, *call, **settings)
        assert torch.equal(counts, want.expand_as(counts)), value


@pytest.mark.parametrize("mode", MODES)
def test_long_rows(device, mode):
    """A million tokens in blocks of 64, 16,384 blocks, and rankings around powers of two."""
    for num_blocks in (1023, 1024, 1025, 2049, 16_384):
        rng = np.random.default_rng(num_blocks)
        peak = rng.normal(size=(1, 1, 2, num_blocks)).astype(np.float32).round(2)
        mass = rng.multinomial(4096, np.full(num_blocks, 1 / num_blocks), size=(1, 1, 2)) / 4096
        needs = np.array([[1, num_blocks // 3]]) if mode == "last_block" else np.array([[0, 0.5]])
        geometry = (128, 64 * num_blocks)
        gamma = 0.7
        expected = reference.select_blocks(peak, mass, needs, *geometry, 64, False, mode, gamma)
        indices, counts = proxyattn.select_blocks(
            torch.from_numpy(peak).to(device),
            torch.from_numpy(mass.astype(np.float32)).to(device),
            torch.from_numpy(needs).to(device, NEEDS_DTYPE[mode]),
            *geometry,
            2,
            64,
            False,
            mode,
            gamma,
        )
        assert_same_lists(indices, expected[0])
        assert np.array_equal(counts.cpu().numpy(), expected[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)], ids=["rows", "batch"])
def test_70000_rows(device, mode, shape):
    peak = torch.randn(shape[0], 1, shape[1], 3).to(device)
    needs = torch.full((shape[0], 2), 2, dtype=torch.int32, device=device)
    if mode == "top_p":  # three equal masses, half of which is needed
        needs = torch.zeros(needs.shape, device=device)
    indices, counts = proxyattn.select_blocks(
        peak,
        torch.ones_like(peak),
        needs,
        64 * shape[1],
        192,
        2,
        64,
        False,
        mode,
        gamma=0.5,
        min_budget=0,
        num_sink_blocks=0,
    )
    assert torch.equal(indices.long(), peak.argsort(dim=-1, descending=True))
    assert (counts == 2).all()
