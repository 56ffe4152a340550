"""Stages inside windows: what a query block's window hides exists for none of them."""

import numpy as np
import proxyattn
import pytest
import torch
from arguments import message_of
from chain import random_inputs, scores_of
from inputs import DTYPES, HEAD_DIMS, balanced, lay_out, normal, runs_sm90
from lists import assert_same_lists, assert_top_p_counts
from reference import needs as needs_reference
from reference import score as score_reference
from reference import select as select_reference
from reference.grid import visible_blocks
from scores import MODES, NEEDS_DTYPE
from test_needs import assert_budgets, assert_shares
from test_score import assert_right as assert_scores
from test_windows import ALL_WINDOWS, CAUSAL, LONGER
from tolerance import assert_same_bits, assert_within, log_sum_error, logit_error, to_numpy

# ---- stages, by the formulas


SCORE_AXES = {
    "lengths": CAUSAL + LONGER,
    "window": ALL_WINDOWS,
    "proxies": ((1, 1), (2, 2), (4, 2)),
    "head_dim": HEAD_DIMS,
    "stride": (1, 2, 4, 8),
    "block_size": (64, 128),
    "dtype": DTYPES,
}


@pytest.mark.parametrize("case", balanced(SCORE_AXES, 96, seed=11), ids=str)
def test_scores(device, case):
    q_len, kv_len = case["lengths"]
    rng = np.random.default_rng([q_len, kv_len, case["stride"]])
    q, k = (
        normal(rng, (2, -(-n // case["stride"]), heads, case["head_dim"]), case["dtype"])
        for n, heads in zip((q_len, kv_len), case["proxies"], strict=True)
    )
    tensors = [lay_out(x, case["dtype"], device) for x in (q, k)]
    settings = (q_len, kv_len, case["stride"], case["block_size"], True)
    window = {"window": case["window"]}
    scores = proxyattn.score_blocks(*tensors, *settings, with_mass=True, **window)
    assert_scores(scores, score_reference.score_blocks(q, k, *settings, **window), q, k)
    peak, _ = proxyattn.score_blocks(*tensors, *settings, **window)
    assert_same_bits(peak, scores[0])


NEED_AXES = {
    "lengths": CAUSAL + LONGER,
    "window": ALL_WINDOWS,
    "heads": ((4, 4), (8, 2), (7, 1)),
    "head_dim": HEAD_DIMS,
    "block_size": (64, 128),
    "gamma": (0.1, 0.5, 0.9, 0.99),
    "forcing": ((1, 1), (0, 1), (0, 0), (4, 2)),
    "dtype": DTYPES,
}


@pytest.mark.parametrize("case", balanced(NEED_AXES, 96, seed=12), ids=str)
def test_needs(device, case):
    rng = np.random.default_rng([*case["lengths"], case["head_dim"]])
    q, k = (
        normal(rng, (2, n, heads, case["head_dim"]), case["dtype"])
        for n, heads in zip(case["lengths"], case["heads"], strict=True)
    )
    tensors = [lay_out(x, case["dtype"], device) for x in (q, k)]
    block_size, gamma = case["block_size"], case["gamma"]
    window = {"window": case["window"]}
    a = needs_reference.block_mass(q, k, block_size, True, **window)
    budgets = proxyattn.estimate_budgets(*tensors, gamma, block_size, **window)
    expected = needs_reference.budgets_of(a, gamma)
    assert_budgets(budgets, expected, needs_reference.reached(a), gamma)
    shares = proxyattn.estimate_shares(*tensors, block_size, True, None, *case["forcing"], **window)
    geometry = (*case["lengths"], block_size, True)
    forced = needs_reference.last_forced(*geometry, *case["forcing"], **window)
    assert_shares(shares, a, forced, q, k)


SELECT_AXES = {
    "lengths": ((1, 1), (65, 65), (100, 2049), (640, 1700), (1300, 1300)),
    "window": (1, 64, 65, 200, 700, 1300, 2**62),
    "heads": ((4, 4), (8, 2), (7, 1)),
    "block_size": (64, 128),
    "mode": MODES,
    "gamma": (0.0, 0.3, 0.7, 0.95, 1.0),
    "min_budget": (0, 1, 200),
    "num_sink_blocks": (0, 1, 2, 100),
    "num_local_blocks": (0, 1, 3, 100),
}


def random_scores(rng, heads, geometry, window):
    """(peak, mass, shares, budgets), and where blocks are hidden."""
    q_len, kv_len, block_size, _ = geometry
    rows, blocks = (-(-n // block_size) for n in (q_len, kv_len))
    shown = np.zeros((rows, blocks), dtype=bool)
    for m in range(rows):
        shown[m, visible_blocks(m, *geometry, window)] = True
    shape = (2, heads[1], rows, blocks)
    peak = np.where(shown, rng.normal(size=shape), -np.inf).astype(np.float32)
    mass = np.where(shown, rng.exponential(size=shape) ** 2, 0)
    mass = (mass / mass.sum(axis=-1, keepdims=True)).astype(np.float32)
    shares = rng.random((2, heads[0])).astype(np.float32).astype(np.float64)
    return peak, mass, shares, rng.integers(1, blocks + 1, size=(2, heads[0]))


@pytest.mark.parametrize("case", balanced(SELECT_AXES, 80, seed=13), ids=str)
def test_selection(device, case):
    geometry = (*case["lengths"], case["block_size"], True)
    mode, gamma, window = case["mode"], case["gamma"], case["window"]
    names = ("min_budget", "num_sink_blocks", "num_local_blocks")
    forcing = {name: case[name] for name in names}
    rng = np.random.default_rng(geometry[:3])
    peak, mass, shares, budgets = random_scores(rng, case["heads"], geometry, window)
    top_p = mode == "top_p"
    needs = shares if top_p else budgets
    indices, counts = proxyattn.select_blocks(
        torch.from_numpy(peak).to(device),
        torch.from_numpy(mass).to(device) if top_p else None,
        torch.from_numpy(needs).to(device, NEEDS_DTYPE[mode]),
        *case["lengths"],
        case["heads"][0],
        case["block_size"],
        budget_mode=mode,
        gamma=gamma,
        window=window,
        **forcing,
    )
    mass = mass.astype(np.float64)
    want, want_counts = select_reference.select_blocks(
        peak, mass, needs, *geometry, mode, gamma, **forcing, window=window
    )
    assert_same_lists(indices, want)
    if top_p:
        rows = (want, mass, needs, geometry, gamma)
        assert_top_p_counts(counts, *rows, **forcing, window=window)
    else:
        assert np.array_equal(counts.cpu().numpy(), want_counts)


# ---- by hand


def test_scores_by_hand(device):
    """Equal keys, and a window of 65: every row has its own block and the one before it, whole."""
    q = k = torch.zeros(1, 32, 1, 64, dtype=torch.bfloat16, device=device)
    peak, mass = proxyattn.score_blocks(q, k, 256, 256, 8, 64, with_mass=True, window=65)
    seen = [[torch.arange(1, 9)], *[[torch.full((8,), 8), torch.arange(1, 9)]] * 3]
    for m, blocks in enumerate(seen):
        total = sum(blocks).double()
        first = max(0, m - 1)
        want = torch.zeros(4, dtype=torch.float64)
        want[first : first + len(blocks)] = torch.stack([(n / total).mean() for n in blocks])
        np.testing.assert_allclose(to_numpy(mass[0, 0, m]), want.numpy(), rtol=1e-5)
        best = (1 / total.min()).log().item()
        logs = [best if first <= n < first + len(blocks) else -np.inf for n in range(4)]
        np.testing.assert_allclose(to_numpy(peak[0, 0, m]), logs, atol=1e-5)


def test_needs_by_hand(device):
    """All attention lies in one block of eight: far away, behind the window, and near."""
    q = torch.ones(1, 64, 1, 64, dtype=torch.bfloat16, device=device)
    k = torch.zeros(1, 512, 1, 64, dtype=torch.bfloat16, device=device)
    k[:, :64] = 4.0
    assert proxyattn.estimate_budgets(q, k, 0.99).item() == 1
    # Of the three blocks that a window of 128 touches all are alike.
    assert proxyattn.estimate_budgets(q, k, 0.99, window=128).item() == 3
    assert proxyattn.estimate_shares(q, k).item() > 0.99  # the sink
    # Its own block is the last of three, of which query i sees i + 1 keys.
    seen = torch.arange(1, 65, dtype=torch.float64)
    share = proxyattn.estimate_shares(q, k, window=128).item()
    assert share == pytest.approx((seen / (128 + seen)).mean().item(), rel=1e-5)


# ---- many keys, by the CPU, whose kernels the formulas are held against above


def on_cpu(tensors):
    return [x.cpu() for x in tensors]


@pytest.mark.parametrize("lengths", [(3000, 20_011), (5000, 5000)], ids=str)
@pytest.mark.parametrize("window", [1, 1000, 4100, 17_000])
@pytest.mark.parametrize("stride", [1, 8])
def test_scores_of_many_keys(cuda, lengths, window, stride):
    """A row's keys lie in several chunks, or in one of many."""
    shapes = [(1, -(-n // stride), heads, 128) for n, heads in zip(lengths, (2, 1), strict=True)]
    tensors = [torch.randn(shape).bfloat16().to(cuda) for shape in shapes]
    settings = {"stride": stride, "block_size": 64, "with_mass": True, "window": window}
    got = proxyattn.score_blocks(*tensors, *lengths, **settings)
    peak, mass = map(to_numpy, proxyattn.score_blocks(*on_cpu(tensors), *lengths, **settings))
    off = logit_error(*map(to_numpy, tensors))
    error = 2 * log_sum_error(peak, off, shapes[1][1])
    assert_within(got[0], peak, error, "peak")
    assert_within(got[1], mass, mass * np.expm1(error) + 2.0**-126, "mass")


@pytest.mark.parametrize("lengths", [(100, 9000), (64, 70_000)], ids=str)
@pytest.mark.parametrize("window", [1, 3000, 8999, 40_000])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_needs_of_many_keys(cuda, lengths, window, head_dim):
    q, k, _ = random_inputs(cuda, *lengths, head_dim=head_dim, batch=1)
    shares = proxyattn.estimate_shares(q, k, window=window)
    want = proxyattn.estimate_shares(*on_cpu((q, k)), window=window)
    torch.testing.assert_close(shares.cpu(), want, atol=1e-5, rtol=1e-3)
    budgets = proxyattn.estimate_budgets(q, k, 0.8, window=window)
    want = proxyattn.estimate_budgets(*on_cpu((q, k)), 0.8, window=window)
    assert (budgets.cpu() - want).abs().max() <= 1  # where a part lies at gamma


@pytest.mark.parametrize("lengths", [(64 * 600 + 10, 64 * 600 + 10), (700, 64 * 300)], ids=str)
@pytest.mark.parametrize("blocks", [1, 127, 128, 129, 520])
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_all_sizes(cuda, lengths, blocks, mode):
    """Early rows see fewer blocks than the window holds, the last one too: each is sorted by the
    kernel of its size."""
    rng = np.random.default_rng(blocks)
    for window in (64 * blocks - 1, 64 * blocks + 1):
        rows, columns = (-(-n // 64) for n in lengths)
        peak = torch.from_numpy(rng.normal(size=(1, 2, rows, columns)).astype(np.float32))
        mass = torch.from_numpy(rng.random((1, 2, rows, columns)).astype(np.float32))
        needs = torch.rand(1, 4)
        if mode == "last_block":
            mass, needs = None, (needs * 2 * blocks).int() + 1
        settings = {"budget_mode": mode, "gamma": 0.8, "min_budget": 0, "window": window}
        call = (*lengths, 4, 64)
        want = proxyattn.select_blocks(peak, mass, needs, *call, **settings)
        inputs = [x if x is None else x.to(cuda) for x in (peak, mass, needs)]
        got = proxyattn.select_blocks(*inputs, *call, **settings)
        for first, second in zip(got, want, strict=True):
            assert torch.equal(first.cpu(), second)


# ---- what reaches nobody


@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("window", [1, 100, 300])
def test_keys_of_one_query_block_are_nothing_to_the_next(device, stride, window):
    """NaN where the window of a query block reaches and that of the next does not."""
    q, k = (torch.randn(1, n // stride, 2, 64).bfloat16().to(device) for n in (512, 1024))
    settings = {"stride": stride, "block_size": 64, "with_mass": True, "window": window}
    want = proxyattn.score_blocks(q, k, 512, 1024, **settings)
    for m in range(7):
        first = int(visible_blocks(m + 1, 512, 1024, 64, True, window)[0])
        spoilt = k.clone()
        spoilt[:, : first * 64 // stride] = torch.nan
        got = proxyattn.score_blocks(q, spoilt, 512, 1024, **settings)
        assert got[0][:, :, m].isnan().any()
        for x, y in zip(got, want, strict=True):
            assert_same_bits(x[:, :, m + 1 :], y[:, :, m + 1 :])


def test_hidden_keys_are_nothing_to_needs(device):
    q, k, _ = random_inputs(device, 200, 1024)
    spoilt = k.clone()
    spoilt[:, : (1024 - 64 + 1 - 300) // 64 * 64] = torch.nan
    for estimate in (proxyattn.estimate_shares, proxyattn.estimate_budgets):
        arguments = () if estimate is proxyattn.estimate_shares else (0.7,)
        want = estimate(q, k, *arguments, window=300)
        assert torch.equal(estimate(q, spoilt, *arguments, window=300), want)


def test_a_nan_inside_the_window_takes_all_of_it(device):
    """Budgets count every key block, those that are hidden too; lists are cut to what is seen."""
    q, k, _ = random_inputs(device, 200, 1024)
    k[:, -1] = torch.nan
    assert (proxyattn.estimate_budgets(q, k, 0.7, window=300) == 16).all()
    assert proxyattn.estimate_shares(q, k, window=300).isnan().all()
    settings = {"gamma": 0.1, "min_budget": 0, "window": 300}
    _, counts = proxyattn.choose_blocks(q, k, **settings)
    seen = [len(visible_blocks(m, 200, 1024, 64, True, 300)) for m in range(4)]
    assert (counts.cpu() == torch.tensor(seen)).all()


# ---- families of kernels


def windowed_stages(q, k, window):
    """The results of the stages that a family has kernels of."""
    return (
        *scores_of(q, k, window=window),
        proxyattn.estimate_shares(q, k, window=window),
        proxyattn.estimate_budgets(q, k, 0.7, window=window),
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_windows_are_for_the_portable_kernels(cuda, head_dim, monkeypatch):
    """On any device, whatever newer ones it has."""
    q, k, _ = random_inputs(cuda, 300, 900, head_dim=head_dim)
    default = windowed_stages(q, k, 200)
    monkeypatch.setenv("PROXYATTN_FAMILY", "sm80")
    for got, want in zip(default, windowed_stages(q, k, 200), strict=True):
        assert_same_bits(got, want)


def test_a_family_without_windows_refuses_them(cuda, monkeypatch):
    if not runs_sm90(cuda):
        pytest.skip("no kernels for Hopper run here")
    q, k, _ = random_inputs(cuda, 300, 900)
    monkeypatch.setenv("PROXYATTN_FAMILY", "sm90")
    for op, estimate in (
        ("score_blocks", scores_of),
        ("estimate_shares", proxyattn.estimate_shares),
    ):
        with pytest.raises(ValueError) as error:
            estimate(q, k, window=200)
        assert message_of(error) == (
            f"{op}: PROXYATTN_FAMILY must name a family that takes this device and layout, got "
            "sm90 with head_dim=64, dtype=bfloat16, window=200, compute capability 9.0"
        )
