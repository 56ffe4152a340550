"""proxy_attention and choose_blocks: the stages in one call."""

from dataclasses import dataclass

import numpy as np
import proxyattn
import pytest
import torch
from arguments import PIPELINES, smallest_workspace
from chain import assert_attends_to, attend, choose_by_stages, random_inputs
from inputs import (
    DTYPES,
    HALF_DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    balanced,
    lay_out,
    name_of,
    normal,
    rounded,
)
from lists import assert_same_lists, assert_top_p_counts
from proxyattn.ops import DEFAULT_GAMMA
from reference import pipeline
from reference.grid import num_visible
from scores import MODES
from tolerance import assert_same_bits, order_error

FORCED = ("num_sink_blocks", "num_local_blocks")


@dataclass(frozen=True)
class Case:
    lengths: tuple
    heads: tuple
    head_dim: int
    stride: int
    pooling: str
    block_size: int
    budget_mode: str
    given_shares: bool
    gamma: float
    forcing: tuple
    dtype: torch.dtype
    layout: str

    def __str__(self):
        q_len, kv_len, causal = self.lengths
        return (
            f"m{q_len}-n{kv_len}-{'causal' if causal else 'full'}-"
            f"h{'x'.join(map(str, self.heads))}-d{self.head_dim}-s{self.stride}-"
            f"{self.pooling}-k{self.block_size}-{self.budget_mode}-"
            f"{'given' if self.given_shares else 'own'}-gamma{self.gamma}-"
            f"min{self.forcing[0]}-sink{self.forcing[1]}-local{self.forcing[2]}-"
            f"{name_of(self.dtype)}-{self.layout}"
        )

    @property
    def settings(self):
        return {
            "causal": self.lengths[2],
            "gamma": self.gamma,
            "stride": self.stride,
            "pooling": self.pooling,
            "block_size": self.block_size,
            "num_proxy_heads": self.heads[2],
            "budget_mode": self.budget_mode,
            "min_budget": self.forcing[0],
            "num_sink_blocks": self.forcing[1],
            "num_local_blocks": self.forcing[2],
        }


def cases(count, seed):
    axes = {
        "lengths": (
            (1, 300, True),
            (129, 129, True),
            (256, 256, True),
            (255, 700, True),
            (257, 1000, False),
            (521, 521, True),
            (600, 350, False),
        ),
        "heads": ((4, 4, 2), (4, 1, 1), (8, 2, 2), (7, 1, 7), (8, 2, 1), (8, 2, 4), (6, 3, 6)),
        "head_dim": HEAD_DIMS,
        "stride": (1, 2, 4, 8),
        "pooling": ("mean", "first"),
        "block_size": (64, 128),
        "budget_mode": MODES,
        "given_shares": (False, False, True),
        "gamma": (0.3, 0.6, 0.9),
        "forcing": ((0, 1, 1), (0, 0, 0), (100, 2, 2)),
        "dtype": DTYPES,
        "layout": LAYOUTS,
    }
    return [Case(**values) for values in balanced(axes, count, seed)]


def check_chain(case, device):
    q_len, kv_len, _ = case.lengths
    rng = np.random.default_rng([q_len, kv_len, case.head_dim])
    tensors = [
        lay_out(normal(rng, (2, n, h, case.head_dim), case.dtype, s), case.dtype, device, layout)
        for n, h, s, layout in (
            (q_len, case.heads[0], 2.0, case.layout),
            (kv_len, case.heads[1], 1.0, case.layout),
            (kv_len, case.heads[1], 1.0, "plain"),
        )
    ]
    settings = case.settings
    if case.given_shares and case.budget_mode == "top_p":
        settings["shares"] = torch.rand(2, case.heads[0]).to(device)
    indices, counts = choose_by_stages(*tensors[:2], **settings)
    chosen = proxyattn.choose_blocks(*tensors[:2], **settings)
    assert torch.equal(chosen[0], indices) and torch.equal(chosen[1], counts)
    out, lse = proxyattn.proxy_attention(*tensors, **settings, return_lse=True)
    assert out.dtype == case.dtype and out.shape == tensors[0].shape and out.is_contiguous()
    # Where the settings decide that all blocks are read, they may be read in another order.
    all_read = -(-case.forcing[0] // case.block_size) >= -(-kv_len // case.block_size)
    if device == "cpu" and not all_read:
        want, want_lse = attend(*tensors, indices, counts, **settings)
        assert_same_bits(out, want)
        assert_same_bits(lse, want_lse)
    else:
        assert_attends_to(out, lse, tensors, indices, counts, settings)
    assert_same_bits(proxyattn.proxy_attention(*tensors, **settings), out)


@pytest.mark.parametrize("case", cases(120, seed=1), ids=str)
def test_equals_the_chain_of_its_stages(device, case):
    """Lists everywhere; what is made of them on the CPU bit for bit."""
    check_chain(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(600, seed=2), ids=str)
def test_equals_the_chain_of_its_stages_sweep(device, case):
    check_chain(case, device)


def smallest_gap(chosen, q_len, kv_len, block_size, causal):
    """How near the reference came to other lists: the least distance of neighbouring peaks."""
    gaps = [
        np.diff(np.sort(row[: num_visible(m, q_len, kv_len, block_size, causal)]))
        for rows in chosen["peak"].reshape(-1, *chosen["peak"].shape[2:])
        for m, row in enumerate(rows)
    ]
    return np.concatenate(gaps).min()


def assert_lists_of_the_formulas(indices, counts, q, k, settings):
    """All stages against the reference from end to end, q and k in numpy. The reference's peaks lie
    further apart than any error of the kernels, so the lists must be the very same."""
    chosen = pipeline.choose_blocks(
        q, k, round_to_dtype=lambda x: rounded(x, torch.bfloat16), **settings
    )
    geometry = (q.shape[1], k.shape[1], settings["block_size"], settings["causal"])
    assert smallest_gap(chosen, *geometry) > 1e-4
    assert_same_lists(indices, chosen["indices"])
    if settings["budget_mode"] == "last_block":
        assert np.array_equal(counts.cpu().numpy(), chosen["counts"])
        return
    forcing = {name: settings[name] for name in ("gamma", "min_budget", *FORCED)}
    rankings, mass, shares = (chosen[name] for name in ("indices", "mass", "needs"))
    assert_top_p_counts(counts, rankings, mass, shares, geometry, **forcing)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", MODES)
def test_lists_are_those_of_the_formulas(device, mode, seed):
    q_len, kv_len, causal = ((500, 500, True), (200, 611, True), (130, 500, False))[seed % 3]
    rng = np.random.default_rng(seed)
    q, k, v = (
        normal(rng, (1, n, h, 64), torch.bfloat16, spread)
        for n, h, spread in ((q_len, 8, 3.0), (kv_len, 2, 1.5), (kv_len, 2, 1.0))
    )
    tensors = [lay_out(x, torch.bfloat16, device) for x in (q, k, v)]
    settings = {
        "causal": causal,
        "gamma": (0.5, 0.8)[seed % 2],
        "stride": 2,
        "pooling": ("mean", "mean", "first")[seed % 3],
        "block_size": 64,
        "num_proxy_heads": (1, 2, 2, 4, 4, 8)[seed],
        "budget_mode": mode,
        "min_budget": 0,
        "num_sink_blocks": seed % 2,
        "num_local_blocks": (1, 2)[seed % 2],
    }
    indices, counts = proxyattn.choose_blocks(*tensors[:2], **settings)
    assert_lists_of_the_formulas(indices, counts, q, k, settings)
    out, lse = proxyattn.proxy_attention(*tensors, **settings, return_lse=True)
    assert_attends_to(out, lse, tensors, indices, counts, settings)


@pytest.mark.parametrize(("heads", "proxies"), [((4, 4), 4), ((4, 2), 1)])
def test_the_papers_own_setting(device, heads, proxies):
    """First tokens, budgets of the last block, blocks of 128, its floor and its proxies."""
    rng = np.random.default_rng(0)
    q, k = (
        normal(rng, (1, 2900, h, 64), torch.bfloat16, spread)
        for h, spread in zip(heads, (3.0, 1.0), strict=True)
    )
    q[:, :, 0] = 2 * q[:, :1, 0]  # a head that looks at few keys
    tensors = [lay_out(x, torch.bfloat16, device) for x in (q, k, k)]
    settings = {
        "causal": True,
        "gamma": 0.95,
        "stride": 4,
        "pooling": "first",
        "block_size": 128,
        "num_proxy_heads": proxies,
        "budget_mode": "last_block",
        "min_budget": 2048,
        "num_sink_blocks": 1,
        "num_local_blocks": 1,
    }
    indices, counts = proxyattn.choose_blocks(*tensors[:2], **settings)
    # 23 blocks are visible in the end. The floor of 16 holds where the budget is less.
    assert counts[0, 0, -1] == 16 and all(16 < x < 23 for x in counts[0, 1:, -1].tolist())
    assert_lists_of_the_formulas(indices, counts, q, k, settings)
    out, lse = proxyattn.proxy_attention(*tensors, **settings, return_lse=True)
    want, want_lse = attend(*tensors, indices, counts, **settings)
    torch.testing.assert_close(out, want, atol=order_error(want), rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 1.0, "min_budget": 0},
        {"gamma": 7.0, "min_budget": 0},
        {"gamma": 0.1, "min_budget": 400},
        {"gamma": 0.1, "min_budget": 2**63 - 1},
        {"gamma": 0.1},  # the default min_budget is longer than the sequence
        {"gamma": 0.1, "min_budget": 0, "num_sink_blocks": 7},
    ],
    ids=lambda settings: "-".join(f"{name}{value}" for name, value in settings.items()),
)
def test_all_blocks_is_dense_attention(device, dtype, mode, causal, settings):
    tensors = random_inputs(device, 400, 400, dtype=dtype)
    settings = {**settings, "block_size": 64, "budget_mode": mode, "causal": causal}
    out, lse = proxyattn.proxy_attention(*tensors, **settings, return_lse=True)
    indices = torch.arange(7, dtype=torch.int32, device=device).expand(2, 1, 7, 7)
    counts = torch.full((2, 4, 7), 7, dtype=torch.int32, device=device)
    assert_attends_to(out, lse, tensors, indices, counts, settings)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("q_len, kv_len", [(1300, 1300), (700, 1290)])
def test_lists_that_are_read_whole(device, q_len, kv_len, causal, block_size):
    """All heads of one proxy head read all blocks, so that nobody asks for its scores; those of the
    other are needed as ever, but for the rows that see no more than its heads read."""
    q, k, v = random_inputs(device, q_len, kv_len, heads=(8, 2), head_dim=128)
    q[:, :, :4] = 0  # attends to everything alike
    q[:, :, 4:] += 4
    k[:, 100:150, 1] = 1  # attends here
    settings = {
        "causal": causal,
        "gamma": 0.9999,
        "block_size": block_size,
        "num_proxy_heads": 2,
        "budget_mode": "last_block",
        "min_budget": 0,
    }
    indices, counts = choose_by_stages(q, k, **settings)
    visible = (indices >= 0).sum(-1)[:, :, None]
    whole = counts.unflatten(1, (2, 4)) == visible
    assert whole[:, 0].all() and not whole[:, 1].all()
    out, lse = proxyattn.proxy_attention(q, k, v, **settings, return_lse=True)
    assert_attends_to(out, lse, (q, k, v), indices, counts, settings)
    limit = smallest_workspace({"q": q, "k": k, "v": v, **settings})
    pieces = proxyattn.proxy_attention(
        q, k, v, **settings, return_lse=True, max_workspace_bytes=limit
    )
    assert_same_bits(pieces[0], out)
    assert_same_bits(pieces[1], lse)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_a_small_workspace_gives_the_same_bits(device, dtype, mode):
    """Whether rows are worked on one by one, some at a time or all at once."""
    tensors = random_inputs(device, 1500, 1700, dtype=dtype)
    settings = {"gamma": 0.6, "min_budget": 0, "block_size": 64, "budget_mode": mode}
    want, want_lse = proxyattn.proxy_attention(*tensors, **settings, return_lse=True)
    needed = smallest_workspace({**dict(zip("qkv", tensors, strict=True)), **settings})
    for limit in (needed, needed + 1, needed + 3000, 2 * needed, 2**62):
        out, lse = proxyattn.proxy_attention(
            *tensors, **settings, return_lse=True, max_workspace_bytes=limit
        )
        assert_same_bits(out, want, f"out at {limit} bytes")
        assert_same_bits(lse, want_lse, f"lse at {limit} bytes")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("proxies", [1, 2, 4])
def test_a_small_workspace_gives_the_same_lists(device, mode, proxies):
    q, k, _ = random_inputs(device, 1500, 1700)
    settings = {"gamma": 0.6, "min_budget": 0, "budget_mode": mode, "num_proxy_heads": proxies}
    indices, counts = proxyattn.choose_blocks(q, k, **settings)
    needed = smallest_workspace({"q": q, "k": k, **settings}, op="choose_blocks")
    for limit in (needed, needed + 3000, 2 * needed):
        again = proxyattn.choose_blocks(q, k, **settings, max_workspace_bytes=limit)
        assert torch.equal(again[0], indices) and torch.equal(again[1], counts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", PIPELINES)
def test_the_workspace_grows_with_the_sequence_alone(device, op, mode):
    """At its smallest it holds one row of scores, not a square of them."""
    names = "qkv" if op == "proxy_attention" else "qk"
    settings = {"gamma": 0.6, "min_budget": 0, "budget_mode": mode}
    short, long = (
        smallest_workspace(
            {**dict(zip(names, random_inputs(device, n, n, batch=1), strict=False)), **settings},
            op=op,
        )
        for n in (2048, 4096)
    )
    assert long < 2.5 * short


@pytest.mark.parametrize("mode", MODES)
def test_less_gamma_reads_less(device, mode):
    q, k, _ = random_inputs(device, 1000, 1000)
    read = []
    for gamma in (0.1, 0.5, 0.8, 0.95, 1.0):
        settings = {"gamma": gamma, "budget_mode": mode, "min_budget": 0}
        _, counts = proxyattn.choose_blocks(q, k, **settings)
        read.append(int(counts.sum()))
    assert read == sorted(read) and read[0] < read[-1] / 2
    assert read[-1] == 8 * (16 * 17) // 2


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_every_time(device, mode, set_threads):
    tensors = random_inputs(device, 900, 1300, (7, 1), head_dim=128)
    settings = {"gamma": 0.7, "min_budget": 0, "block_size": 64, "budget_mode": mode}
    want = proxyattn.proxy_attention(*tensors, **settings, return_lse=True)
    for threads in (1, 2, 3):
        set_threads(threads)
        again = proxyattn.proxy_attention(*tensors, **settings, return_lse=True)
        for got, first in zip(again, want, strict=True):
            assert_same_bits(got, first)


def test_batch_entries_are_independent(device):
    tensors = random_inputs(device, 500, 700, batch=3)
    settings = {"gamma": 0.7, "min_budget": 0, "block_size": 64, "budget_mode": "top_p"}
    whole = proxyattn.proxy_attention(*tensors, **settings)
    for b in range(3):
        part = proxyattn.proxy_attention(*(x[b : b + 1] for x in tensors), **settings)
        assert_same_bits(part, whole[b : b + 1])


def test_defaults(device):
    """Those that the README lists."""
    q, k, v = random_inputs(device, 3000, 3000, batch=1)
    for mode, min_budget in (("top_p", 512), ("last_block", 2048)):
        spelled_out = {
            "causal": True,
            "scale": 64**-0.5,
            "gamma": DEFAULT_GAMMA[mode],
            "stride": 4,
            "pooling": "mean",
            "block_size": 64,
            "num_proxy_heads": 4,
            "budget_mode": mode,
            "min_budget": min_budget,
            "num_sink_blocks": 1,
            "num_local_blocks": 1,
            "shares": None,
            "max_workspace_bytes": None,
        }
        out = proxyattn.proxy_attention(q, k, v, **spelled_out, return_lse=False)
        indices, counts = proxyattn.choose_blocks(q, k, **spelled_out)
        for short in [{"budget_mode": mode}] + [{}] * (mode == "top_p"):  # the default mode
            assert_same_bits(proxyattn.proxy_attention(q, k, v, **short), out)
            chosen = proxyattn.choose_blocks(q, k, **short)
            assert torch.equal(chosen[0], indices) and torch.equal(chosen[1], counts)


def test_shares_are_estimated_from_the_call(device):
    """None means what estimate_shares gives; others are taken at their word."""
    q, k, v = random_inputs(device, 700, 900)
    settings = {"gamma": 0.8, "min_budget": 0, "num_sink_blocks": 2, "num_local_blocks": 0}
    forcing = {name: settings[name] for name in FORCED}
    shares = proxyattn.estimate_shares(q, k, **forcing)
    _, counts = proxyattn.choose_blocks(q, k, **settings)
    _, given = proxyattn.choose_blocks(q, k, **settings, shares=shares)
    assert torch.equal(given, counts)
    out = proxyattn.proxy_attention(q, k, v, **settings)
    strided = torch.stack([shares, shares + 1], dim=-1)[..., 0]
    assert_same_bits(proxyattn.proxy_attention(q, k, v, **settings, shares=strided), out)
    # Head 0 has all that it needs, head 1 may need anything, head 2 needs .8 of what is not forced.
    shares = torch.tensor([[1.0, torch.nan, 0.0, 0.8]] * 2, device=device)
    indices, counts = proxyattn.choose_blocks(q, k, **settings, shares=shares)
    visible = (indices[:, 0] >= 0).sum(-1)
    assert (counts[:, 0] == 2).all() and (counts[:, 3] == 2).all()
    assert torch.equal(counts[:, 1].long(), visible)
    assert (counts[:, 2] > 2).all()
    out, lse = proxyattn.proxy_attention(q, k, v, **settings, shares=shares, return_lse=True)
    assert_attends_to(out, lse, (q, k, v), indices, counts, settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", [{"gamma": 1.0}, {"min_budget": 2**63 - 1}])
def test_lists_of_all_blocks_are_ranked_too(device, mode, changes):
    """Whoever asks for lists gets rankings, also where the settings say that all of it is read."""
    q, k, _ = random_inputs(device, 500, 700)
    settings = {"gamma": 0.5, "min_budget": 0, "budget_mode": mode}
    indices, _ = proxyattn.choose_blocks(q, k, **settings)
    chosen, counts = proxyattn.choose_blocks(q, k, **{**settings, **changes})
    assert torch.equal(chosen, indices)
    visible = (indices >= 0).sum(-1)[:, :1].expand_as(counts)
    assert torch.equal(counts.long(), visible)


def test_return_lse(device):
    tensors = random_inputs(device, 300, 300)
    out, lse = proxyattn.proxy_attention(*tensors, return_lse=True)
    assert lse.shape == (2, 4, 300) and lse.dtype == torch.float32
    assert_same_bits(proxyattn.proxy_attention(*tensors), out)
    gamma = DEFAULT_GAMMA["top_p"]
    _, unused = torch.ops.proxyattn.proxy_attention(
        *tensors, True, None, gamma, 4, "mean", 64, 4, "top_p", 512, 1, 1, None, False, None
    )
    assert unused.shape == (0,) and unused.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len", "causal"),
    [(0, 100, 200, True), (2, 0, 200, True), (2, 0, 0, True), (2, 100, 0, False)],
)
def test_empty(device, mode, gamma, batch, q_len, kv_len, causal):
    tensors = random_inputs(device, q_len, kv_len, batch=batch)
    out, lse = proxyattn.proxy_attention(
        *tensors, causal=causal, gamma=gamma, budget_mode=mode, min_budget=0, return_lse=True
    )
    assert out.shape == (batch, q_len, 4, 64) and (out == 0).all()
    assert lse.shape == (batch, 4, q_len) and (lse == -torch.inf).all()
    indices, counts = proxyattn.choose_blocks(
        *tensors[:2], causal=causal, gamma=gamma, budget_mode=mode, min_budget=0
    )
    num_rows, num_blocks = -(-q_len // 64), -(-kv_len // 64)
    assert indices.shape == (batch, 4, num_rows, num_blocks)
    assert counts.shape == (batch, 4, num_rows) and (counts == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("proxies", [2, 4])
@pytest.mark.parametrize("what", ["q", "k"])
def test_what_is_broken_is_read(device, mode, proxies, what):
    """A NaN in a sampled token of key head 1 shows where dense attention would show it, and in no
    other group of heads."""
    q, k, v = random_inputs(device, 640, 640, batch=1)
    settings = {"gamma": 0.3, "min_budget": 0, "num_proxy_heads": proxies, "budget_mode": mode}
    clean = proxyattn.proxy_attention(q, k, v, **settings)
    if what == "k":
        k[0, 200, 1, 3] = torch.nan
    else:
        q[0, 200, 3, 3] = torch.nan
    out = proxyattn.proxy_attention(q, k, v, **settings)
    assert_same_bits(out[:, :, :2], clean[:, :, :2])
    dense = proxyattn.proxy_attention(q, k, v, **{**settings, "gamma": 1.0})
    assert torch.equal(out.isnan().any(-1), dense.isnan().any(-1))
    assert dense.isnan().any()


@pytest.mark.parametrize("mode", MODES)
def test_70000_tokens(device, mode):
    q, k, v = random_inputs(device, 70_000, 70_000, (2, 1), batch=1)
    settings = {
        "gamma": {"top_p": 0.05, "last_block": 0.2}[mode],
        "stride": 8,
        "min_budget": 0,
        "budget_mode": mode,
        "scale": 0.3,
    }
    out, lse = proxyattn.proxy_attention(q, k, v, **settings, return_lse=True)
    indices, counts = proxyattn.choose_blocks(q, k, **settings)
    want, want_lse = attend(q, k, v, indices, counts, **settings)
    torch.testing.assert_close(out, want, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=0)
