"""select_blocks: one ranking per group and query block, one prefix length per head."""

import numpy as np
import proxyattn
import pytest
import torch
from lists import assert_same_lists
from reference import select as reference

NAN, INF = float("nan"), float("inf")


def fp32(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device)


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def select_one_row(device, peaks, budgets, mass=None, q_len=1, **settings):
    """One query block of a non-causal call over blocks of 64: (ranking, counts)."""
    settings = {"min_budget": 0, "num_sink_blocks": 0, **settings}
    indices, counts = proxyattn.select_blocks(
        fp32([[[peaks]]], device),
        None if mass is None else fp32([[[mass]]], device),
        int32([budgets], device),
        q_len,
        64 * len(peaks),
        64,
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
    settings = {"min_budget": 0, **settings}
    length = 64 * num_blocks
    indices, counts = proxyattn.select_blocks(
        fp32([[peak]], device), None, int32([budgets], device), length, length, 64, **settings
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
        peak, None, int32([[1]], device), 100, 160, 64, min_budget=0, num_sink_blocks=0
    )
    # Block 0 reaches into key block 1 and begins in key block 0: both are local.
    assert indices[0, 0].tolist() == [[1, 0, -1], [2, 1, 0]]
    assert counts[0, 0].tolist() == [2, 2]


def test_literal_default_min_budget(device):
    """2048 tokens are 32 blocks of 64 in the paper's mode, 1024 are 16 in ours."""
    length = 64 * 40
    peak = torch.zeros(1, 1, 1, 40, device=device)
    mass = torch.full((1, 1, 1, 40), 1 / 40, device=device)
    for mode, count in [("last_block", 32), ("coverage", 16)]:
        _, counts = proxyattn.select_blocks(
            peak, mass, int32([[1]], device), 1, length, 64, causal=False, budget_mode=mode
        )
        assert counts.item() == count


def test_literal_coverage(device):
    """Budget 2 covers 3/4 of the last row; the others take what covers 3/4 of theirs."""
    peak = fp32([[[[-1.0, -2.0, -3.0, -4.0]] * 3]], device)
    mass = fp32([[[[0.75, 0.125, 0.125, 0], [0.25] * 4, [0.5, 0.25, 0.125, 0.125]]]], device)

    def counts_of(budgets, **settings):
        settings = {"min_budget": 0, "num_sink_blocks": 0, **settings}
        _, counts = proxyattn.select_blocks(
            peak,
            mass,
            int32([budgets], device),
            192,
            256,
            64,
            causal=False,
            budget_mode="coverage",
            **settings,
        )
        return counts[0].tolist()

    assert counts_of([2]) == [[1, 3, 2]]
    assert counts_of([1]) == [[1, 2, 1]]
    assert counts_of([3, 4, 9]) == [[2, 4, 3], [4, 4, 4], [4, 4, 4]]
    assert counts_of([0]) == [[1, 1, 1]]
    assert counts_of([1], min_budget=65) == [[2, 2, 2]]
    assert counts_of([1], num_sink_blocks=3) == [[3, 3, 3]]


def test_literal_coverage_follows_the_ranking_of_its_group(device):
    """Heads 0 and 1 are of group 0, 2 and 3 of group 1; forced blocks count into the share."""
    peak = fp32([[[[-1.0, -2.0, -3.0]] * 2, [[-3.0, -2.0, -1.0]] * 2]], device)
    mass = fp32([[[[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]] * 2], device)
    budgets = int32([[1, 2, 1, 2]], device)
    indices, counts = proxyattn.select_blocks(
        peak,
        mass,
        budgets,
        128,
        192,
        64,
        causal=False,
        budget_mode="coverage",
        min_budget=0,
        num_sink_blocks=0,
    )
    assert indices[0, 0].tolist() == [[0, 1, 2]] * 2
    assert indices[0, 1].tolist() == [[2, 1, 0]] * 2
    # Group 0: shares of the last row .5, .75; row 0 has .25, .75, 1. Group 1: .25, .5; row 0 .25,
    # .75.
    assert counts[0].tolist() == [[2, 1], [2, 2], [1, 1], [2, 2]]


def random_call(device, q_len=700, kv_len=1500, causal=True, heads=(6, 3)):
    """Arguments of select_blocks in coverage mode, peak, mass and budgets first."""
    num_rows, num_blocks = -(-q_len // 64), -(-kv_len // 64)
    shape = (2, heads[1], num_rows, num_blocks)
    visible = [reference.num_visible(m, q_len, kv_len, 64, causal) for m in range(num_rows)]
    hidden = torch.arange(num_blocks) >= torch.tensor(visible)[:, None]
    peak = torch.randn(shape).masked_fill(hidden, -INF)
    mass = torch.rand(shape).masked_fill(hidden, 0)
    mass /= mass.sum(-1, keepdim=True)
    budgets = torch.randint(1, num_blocks + 1, (2, heads[0]), dtype=torch.int32)
    return [x.to(device) for x in (peak, mass, budgets)], (q_len, kv_len, 64, causal)


@pytest.mark.parametrize("mode", ["last_block", "coverage"])
def test_every_ranking_is_a_permutation_of_the_visible_blocks(device, mode):
    tensors, geometry = random_call(device)
    tensors[0][torch.rand(tensors[0].shape).to(device) < 0.2] = NAN
    indices, counts = proxyattn.select_blocks(*tensors, *geometry, budget_mode=mode)
    for m in range(indices.shape[2]):
        visible = reference.num_visible(m, *geometry)
        places = torch.arange(visible, device=device).expand(2, 3, visible)
        assert torch.equal(indices[:, :, m, :visible].sort(-1).values.long(), places)
        assert (indices[:, :, m, visible:] == -1).all()
        assert (counts[:, :, m] >= 1).all() and (counts[:, :, m] <= visible).all()


def test_coverage_reaches_its_share_and_one_block_less_does_not(device):
    (peak, mass, budgets), geometry = random_call(device, causal=False)
    indices, counts = proxyattn.select_blocks(
        peak, mass, budgets, *geometry, budget_mode="coverage", min_budget=0, num_sink_blocks=0
    )
    ranked = mass.double().gather(-1, indices.long())
    shares = (ranked.cumsum(-1) / ranked.sum(-1, keepdim=True)).repeat_interleave(2, dim=1)
    last = shares[:, :, -1].gather(-1, budgets.long()[..., None] - 1)
    reached = shares.gather(-1, counts.long()[..., None] - 1)[..., 0]
    before = shares.gather(-1, (counts.long()[..., None] - 2).clamp(min=0))[..., 0]
    assert (reached >= last - 1e-6 - 1e-9).all()
    assert ((before < last - 1e-6 + 1e-9) | (counts == 1)).all()
    # A budget covers its own share, so the last row takes the budget itself.
    assert torch.equal(counts[:, :, -1], budgets)


@pytest.mark.parametrize("mode", ["last_block", "coverage"])
def test_budget_of_all_blocks_is_dense(device, mode):
    (peak, mass, budgets), geometry = random_call(device)
    mass[0, 0, 3] = NAN
    budgets.fill_(24)
    _, counts = proxyattn.select_blocks(
        peak, mass, budgets, *geometry, budget_mode=mode, min_budget=0
    )
    visible = [reference.num_visible(m, *geometry) for m in range(11)]
    assert torch.equal(counts, int32(visible, device).expand_as(counts))


def test_heads_of_a_group_share_prefixes(device):
    """More budget, more blocks, in both modes."""
    (peak, mass, budgets), geometry = random_call(device)
    budgets = budgets.sort(-1).values
    for mode in ("last_block", "coverage"):
        _, counts = proxyattn.select_blocks(
            peak[:, :1], mass[:, :1], budgets, *geometry, budget_mode=mode, min_budget=0
        )
        assert (counts[:, :-1] <= counts[:, 1:]).all()


@pytest.mark.parametrize("row", [2, 10], ids=["inner", "last"])
def test_nan_mass_takes_all_blocks(device, row):
    """A broken row is read whole. If it is the last, there is no share to go by: so are all."""
    (peak, mass, budgets), geometry = random_call(device)
    settings = {"budget_mode": "coverage", "min_budget": 0}
    budgets.clamp_(max=3)
    _, clean = proxyattn.select_blocks(peak, mass, budgets, *geometry, **settings)
    mass[1, 1, row, 4] = NAN
    _, counts = proxyattn.select_blocks(peak, mass, budgets, *geometry, **settings)
    broken_rows = [row] if row == 2 else list(range(11))
    for m in broken_rows:
        clean[1, 2:4, m] = reference.num_visible(m, *geometry)
    assert torch.equal(counts, clean)


def test_mass_need_not_sum_to_one(device):
    """Shares are of the row's own sum."""
    (peak, mass, budgets), geometry = random_call(device)
    settings = {"budget_mode": "coverage", "min_budget": 0}
    _, before = proxyattn.select_blocks(peak, mass, budgets, *geometry, **settings)
    scale = torch.tensor([2.0 ** (m - 5) for m in range(11)], device=device)[:, None]
    _, after = proxyattn.select_blocks(peak, mass * scale, budgets, *geometry, **settings)
    assert torch.equal(before, after)


def test_hidden_blocks_do_not_matter(device):
    """Whatever stands in the scores of blocks past the visible ones."""
    (peak, mass, budgets), geometry = random_call(device)
    settings = {"budget_mode": "coverage", "min_budget": 0}
    before = proxyattn.select_blocks(peak, mass, budgets, *geometry, **settings)
    hidden = peak == -INF
    peak, mass = peak.masked_fill(hidden, 3e38), mass.masked_fill(hidden, NAN)
    after = proxyattn.select_blocks(peak, mass, budgets, *geometry, **settings)
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first, second)


def test_non_contiguous_scores(device):
    tensors, geometry = random_call(device)
    want = proxyattn.select_blocks(*tensors, *geometry, budget_mode="coverage")
    strided = [
        x.transpose(0, 1).contiguous().transpose(0, 1)
        if x.dim() == 2
        else x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        for x in tensors
    ]
    got = proxyattn.select_blocks(*strided, *geometry, budget_mode="coverage")
    for first, second in zip(got, want, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["last_block", "coverage"])
def test_same_lists_every_time(device, mode, set_threads):
    tensors, geometry = random_call(device, 3000, 5000)
    first = proxyattn.select_blocks(*tensors, *geometry, budget_mode=mode)
    for threads in (1, 2, 3):
        set_threads(threads)
        again = proxyattn.select_blocks(*tensors, *geometry, budget_mode=mode)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.parametrize("mode", ["last_block", "coverage"])
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len", "causal"),
    [(0, 100, 200, True), (2, 0, 200, True), (2, 0, 0, True), (2, 100, 0, False)],
)
def test_empty(device, mode, batch, q_len, kv_len, causal):
    num_rows, num_blocks = -(-q_len // 64), -(-kv_len // 64)
    scores = torch.zeros(batch, 2, num_rows, num_blocks, device=device)
    budgets = torch.zeros(batch, 4, dtype=torch.int32, device=device)
    indices, counts = proxyattn.select_blocks(
        scores, scores, budgets, q_len, kv_len, 64, causal, mode
    )
    assert indices.shape == scores.shape
    assert counts.shape == (batch, 4, num_rows)
    assert (counts == 0).all()


@pytest.mark.parametrize("mode", ["last_block", "coverage"])
def test_extreme_settings(device, mode):
    """The largest integers mean all, a budget below one means the fewest."""
    (peak, mass, budgets), geometry = random_call(device)
    visible = int32([reference.num_visible(m, *geometry) for m in range(11)], device)
    for name in ("min_budget", "num_sink_blocks", "num_local_blocks"):
        _, counts = proxyattn.select_blocks(
            peak, mass, budgets, *geometry, budget_mode=mode, **{name: 2**63 - 1}
        )
        assert torch.equal(counts, visible.expand_as(counts)), name
    for value, want in [(2**31 - 1, visible), (-(2**31), int32([1] * 11, device))]:
        _, counts = proxyattn.select_blocks(
            peak,
            mass,
            torch.full_like(budgets, value),
            *geometry,
            budget_mode=mode,
            min_budget=0,
            num_sink_blocks=0,
            num_local_blocks=0,
        )
        assert torch.equal(counts, want.expand_as(counts)), value


@pytest.mark.parametrize("mode", ["last_block", "coverage"])
def test_long_rows(device, mode):
    """A million tokens in blocks of 64, 16,384 blocks, and rankings around powers of two."""
    for num_blocks in (1023, 1024, 1025, 2049, 16_384):
        rng = np.random.default_rng(num_blocks)
        peak = rng.normal(size=(1, 1, 2, num_blocks)).astype(np.float32).round(2)
        mass = rng.multinomial(4096, np.full(num_blocks, 1 / num_blocks), size=(1, 1, 2)) / 4096
        budgets = np.array([[1, num_blocks // 3]])
        geometry = (128, 64 * num_blocks, 64, False)
        expected = reference.select_blocks(peak, mass, budgets, *geometry, mode)
        indices, counts = proxyattn.select_blocks(
            torch.from_numpy(peak).to(device),
            torch.from_numpy(mass.astype(np.float32)).to(device),
            torch.from_numpy(budgets).to(device, torch.int32),
            *geometry,
            mode,
        )
        assert_same_lists(indices, expected[0])
        assert np.array_equal(counts.cpu().numpy(), expected[1])


@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)], ids=["rows", "batch"])
def test_70000_rows(device, shape):
    peak = torch.randn(shape[0], 1, shape[1], 3).to(device)
    budgets = torch.full((shape[0], 2), 2, dtype=torch.int32, device=device)
    indices, counts = proxyattn.select_blocks(
        peak, None, budgets, 64 * shape[1], 192, 64, False, min_budget=0, num_sink_blocks=0
    )
    assert torch.equal(indices.long(), peak.argsort(dim=-1, descending=True))
    assert (counts == 2).all()
