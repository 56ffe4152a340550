"""proxy_attention: the five stages in one call."""

from dataclasses import dataclass

import numpy as np
import plain
import proxyattn
import pytest
import torch
from arguments import smallest_workspace
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
from reference import attention as reference
from reference import pipeline
from reference.grid import num_visible
from tolerance import (
    assert_close,
    assert_same_bits,
    assert_within,
    fp32_attention_errors,
    to_numpy,
)

MODES = ("last_block", "coverage")


def random_inputs(device, q_len, kv_len, heads=(4, 2), dtype=torch.bfloat16, head_dim=64, batch=2):
    """Queries twice as long as usual, so that attention is far from even."""
    return [
        (torch.randn(batch, n, h, head_dim) * spread).to(dtype).to(device)
        for n, h, spread in ((q_len, heads[0], 2), (kv_len, heads[1], 1), (kv_len, heads[1], 1))
    ]


def choose_blocks(
    q,
    k,
    *,
    causal=True,
    scale=None,
    gamma=0.95,
    stride=4,
    block_size=64,
    num_proxy_heads=None,
    budget_mode="last_block",
    **selection,
):
    """Stages 1 to 4 one by one: (indices, counts)."""
    lengths = (q.shape[1], k.shape[1])
    proxies = proxyattn.pool_heads(q, k, num_proxy_heads, stride)
    peak, mass = proxyattn.score_blocks(
        *proxies, *lengths, stride, block_size, causal, scale, budget_mode == "coverage"
    )
    budgets = proxyattn.estimate_budgets(q, k, gamma, block_size, causal, scale)
    return proxyattn.select_blocks(
        peak, mass, budgets, *lengths, block_size, causal, budget_mode, **selection
    )


def attend(q, k, v, indices, counts, *, causal=True, scale=None, block_size=64, **_):
    return proxyattn.block_sparse_attention(
        q, k, v, indices, counts, block_size, causal, scale, return_lse=True
    )


def assert_attends_to(out, lse, tensors, indices, counts, settings):
    """out and lse are right for these lists, by the reference."""
    q, k, v = (to_numpy(x) for x in tensors)
    causal, scale = settings.get("causal", True), settings.get("scale")
    block_size = settings.get("block_size", 64)
    want, want_lse = reference.block_sparse_attention(
        q, k, v, indices.cpu().numpy(), counts.cpu().numpy(), block_size, causal, scale
    )
    out_error, lse_error = fp32_attention_errors(q, k, v, want_lse, scale)
    assert_within(lse, want_lse, lse_error, "lse")
    if out.dtype == torch.float32:
        assert_within(out, want, out_error, "out")
        return
    seen = plain.seen_keys(indices, counts, q.shape[1], k.shape[1], block_size, causal)
    assert_close(out, want, plain.attention(*tensors, seen, scale), "out")


@dataclass(frozen=True)
class Case:
    lengths: tuple
    heads: tuple
    head_dim: int
    stride: int
    block_size: int
    budget_mode: str
    gamma: float
    forcing: tuple
    dtype: torch.dtype
    layout: str

    def __str__(self):
        q_len, kv_len, causal = self.lengths
        return (
            f"m{q_len}-n{kv_len}-{'causal' if causal else 'full'}-"
            f"h{'x'.join(map(str, self.heads))}-d{self.head_dim}-s{self.stride}-"
            f"k{self.block_size}-{self.budget_mode}-gamma{self.gamma}-"
            f"min{self.forcing[0]}-sink{self.forcing[1]}-local{self.forcing[2]}-"
            f"{name_of(self.dtype)}-{self.layout}"
        )

    @property
    def settings(self):
        return {
            "causal": self.lengths[2],
            "gamma": self.gamma,
            "stride": self.stride,
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
        "heads": ((4, 4, 2), (4, 1, 1), (8, 2, 2), (7, 1, 1), (8, 2, 1)),
        "head_dim": HEAD_DIMS,
        "stride": (1, 2, 4, 8),
        "block_size": (64, 128),
        "budget_mode": MODES,
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
    indices, counts = choose_blocks(*tensors[:2], **case.settings)
    out, lse = proxyattn.proxy_attention(*tensors, **case.settings, return_lse=True)
    assert out.dtype == case.dtype and out.shape == tensors[0].shape and out.is_contiguous()
    # Where the settings decide that all blocks are read, they may be read in another order.
    all_read = -(-case.forcing[0] // case.block_size) >= -(-kv_len // case.block_size)
    if device == "cpu" and not all_read:
        want, want_lse = attend(*tensors, indices, counts, **case.settings)
        assert_same_bits(out, want)
        assert_same_bits(lse, want_lse)
    else:
        assert_attends_to(out, lse, tensors, indices, counts, case.settings)
    assert_same_bits(proxyattn.proxy_attention(*tensors, **case.settings), out)


@pytest.mark.parametrize("case", cases(120, seed=1), ids=str)
def test_equals_the_chain_of_its_stages(device, case):
    """On the CPU bit for bit, on a GPU the same lists."""
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


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", MODES)
def test_lists_are_those_of_the_formulas(device, mode, seed):
    """All stages against the reference from end to end. The reference's peaks lie further apart
    than any error of the kernels, so the lists must be the very same."""
    q_len, kv_len, causal = ((500, 500, True), (200, 611, True), (130, 500, False))[seed % 3]
    rng = np.random.default_rng(seed)
    q, k, v = (
        normal(rng, (1, n, h, 64), torch.bfloat16, spread)
        for n, h, spread in ((q_len, 8, 2.0), (kv_len, 2, 1.0), (kv_len, 2, 1.0))
    )
    tensors = [lay_out(x, torch.bfloat16, device) for x in (q, k, v)]
    settings = {
        "causal": causal,
        "gamma": (0.5, 0.8)[seed % 2],
        "stride": 2,
        "block_size": 64,
        "num_proxy_heads": 2,
        "budget_mode": mode,
        "min_budget": 0,
        "num_sink_blocks": seed % 2,
        "num_local_blocks": 1,
    }
    chosen = pipeline.choose_blocks(
        q, k, round_to_dtype=lambda x: rounded(x, torch.bfloat16), **settings
    )
    assert smallest_gap(chosen, q_len, kv_len, 64, causal) > 1e-4
    indices, counts = choose_blocks(*tensors[:2], **settings)
    assert np.array_equal(indices.cpu().numpy(), chosen["indices"])
    assert np.array_equal(counts.cpu().numpy(), chosen["counts"])
    out, lse = proxyattn.proxy_attention(*tensors, **settings, return_lse=True)
    assert_attends_to(out, lse, tensors, indices, counts, settings)


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


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("q_len, kv_len", [(1300, 1300), (700, 1290)])
def test_lists_that_are_read_whole(device, q_len, kv_len, causal, block_size, pieces):
    """All heads of one proxy head read all blocks, so that nobody asks for its scores; those of the
    other are needed as ever, but for the rows that see no more than its heads read."""
    q, k, v = random_inputs(device, q_len, kv_len, heads=(8, 2), head_dim=128)
    q[:, :, :4] = 0  # attends to everything alike
    q[:, :, 4:] += 4
    k[:, 100:150, 1] = 1  # attends here
    settings = {"gamma": 0.9999, "block_size": block_size, "min_budget": 0, "num_proxy_heads": 2}
    settings["causal"] = causal
    indices, counts = choose_blocks(q, k, **settings)
    visible = (indices >= 0).sum(-1)[:, :, None]
    whole = counts.unflatten(1, (2, 4)) == visible
    assert whole[:, 0].all() and not whole[:, 1].all()
    limit = smallest_workspace({"q": q, "k": k, "v": v, **settings}) if pieces else None
    out, lse = proxyattn.proxy_attention(
        q, k, v, **settings, return_lse=True, max_workspace_bytes=limit
    )
    assert_attends_to(out, lse, (q, k, v), indices, counts, settings)


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


def test_the_workspace_grows_with_the_sequence_alone(device):
    """At its smallest it holds one row of scores, not a square of them."""
    settings = {"gamma": 0.6, "min_budget": 0, "block_size": 64, "budget_mode": "coverage"}
    short, long = (
        smallest_workspace(
            {**dict(zip("qkv", random_inputs(device, n, n, batch=1), strict=True)), **settings}
        )
        for n in (2048, 4096)
    )
    assert long < 2.5 * short


@pytest.mark.parametrize("mode", MODES)
def test_less_gamma_reads_less(device, mode):
    q, k, _ = random_inputs(device, 1000, 1000)
    read = []
    for gamma in (0.1, 0.5, 0.8, 0.95, 1.0):
        _, counts = choose_blocks(q, k, gamma=gamma, block_size=64, budget_mode=mode, min_budget=0)
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
    settings = {"gamma": 0.7, "min_budget": 0, "block_size": 64, "budget_mode": "coverage"}
    whole = proxyattn.proxy_attention(*tensors, **settings)
    for b in range(3):
        part = proxyattn.proxy_attention(*(x[b : b + 1] for x in tensors), **settings)
        assert_same_bits(part, whole[b : b + 1])


def test_defaults(device):
    """Those that the README lists."""
    tensors = random_inputs(device, 3000, 3000, batch=1)
    for mode, min_budget in (("last_block", 2048), ("coverage", 1024)):
        short = proxyattn.proxy_attention(*tensors, budget_mode=mode)
        spelled_out = proxyattn.proxy_attention(
            *tensors,
            causal=True,
            scale=64**-0.5,
            gamma=0.95,
            stride=4,
            block_size=64,
            num_proxy_heads=2,
            budget_mode=mode,
            min_budget=min_budget,
            num_sink_blocks=1,
            num_local_blocks=1,
            return_lse=False,
            max_workspace_bytes=None,
        )
        assert_same_bits(short, spelled_out)
    assert_same_bits(
        proxyattn.proxy_attention(*tensors),
        proxyattn.proxy_attention(*tensors, budget_mode="last_block"),
    )


def test_return_lse(device):
    tensors = random_inputs(device, 300, 300)
    out, lse = proxyattn.proxy_attention(*tensors, return_lse=True)
    assert lse.shape == (2, 4, 300) and lse.dtype == torch.float32
    assert_same_bits(proxyattn.proxy_attention(*tensors), out)
    _, unused = torch.ops.proxyattn.proxy_attention(
        *tensors, True, None, 0.95, 4, 64, 2, "last_block", 2048, 1, 1, False, None
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["q", "k"])
def test_what_is_broken_is_read(device, mode, what):
    """A NaN in a sampled token of key head 1 shows where dense attention would show it, and in no
    other group of heads."""
    q, k, v = random_inputs(device, 640, 640, batch=1)
    settings = {"gamma": 0.3, "min_budget": 0, "block_size": 64, "budget_mode": mode}
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
        "gamma": 0.2,
        "stride": 8,
        "min_budget": 0,
        "budget_mode": mode,
        "scale": 0.3,
    }
    out, lse = proxyattn.proxy_attention(q, k, v, **settings, return_lse=True)
    indices, counts = choose_blocks(q, k, **settings)
    want, want_lse = attend(q, k, v, indices, counts, **settings)
    torch.testing.assert_close(out, want, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=0)
