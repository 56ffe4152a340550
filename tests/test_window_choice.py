"""The choice of blocks inside windows, by all stages, and attention to what is chosen."""

import numpy as np
import proxyattn
import pytest
import torch
from arguments import smallest_workspace
from chain import random_inputs, scores_of
from inputs import DTYPES, HEAD_DIMS, balanced, rounded
from lists import assert_same_rankings, assert_top_p_counts
from reference import pipeline
from reference.grid import visible_blocks
from scores import MODES
from test_windows import ALL_WINDOWS, CAUSAL, LONGER, assert_right, sinks_of
from tolerance import assert_same_bits, to_numpy

FORCED = ("num_sink_blocks", "num_local_blocks")
SETTINGS = (
    {"budget_mode": "top_p", "gamma": 0.7},
    {"budget_mode": "top_p", "gamma": 0.9, "num_sink_blocks": 3, "num_local_blocks": 2},
    {"budget_mode": "last_block", "gamma": 0.7},
    {"budget_mode": "last_block", "gamma": 1.0, "num_sink_blocks": 0, "num_local_blocks": 0},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("window", [1, 64, 150, 400, 1000])
@pytest.mark.parametrize("stride", [4, 8])
def test_lists_are_those_of_the_formulas(device, settings, window, stride):
    """Means of 2, 4 or 8 values in bfloat16 are rounded alike, in fp32 and in float64."""
    torch.manual_seed(window)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, _ = random_inputs(device, 300, 900, dtype=dtype, batch=1)
    settings = {**settings, "stride": stride, "num_proxy_heads": 2, "min_budget": 0}
    indices, counts = proxyattn.choose_blocks(q, k, **settings, window=window)
    want = pipeline.choose_blocks(
        to_numpy(q),
        to_numpy(k),
        **settings,
        round_to_dtype=lambda x: rounded(x, dtype),
        window=window,
    )
    assert_same_rankings(indices, want["indices"], want["peak"])
    if settings["budget_mode"] == "top_p":
        forcing = {name: settings[name] for name in FORCED if name in settings}
        rankings, geometry = to_numpy(indices).astype(int), (300, 900, 64, True)
        rows = (rankings, want["mass"], want["needs"], geometry, settings["gamma"])
        assert_top_p_counts(counts, *rows, **forcing, window=window)
    else:
        assert np.array_equal(counts.cpu().numpy(), want["counts"])
    for m in range(indices.shape[2]):
        visible = visible_blocks(m, 300, 900, 64, True, window)
        for ranking in indices[0, :, m].tolist():
            assert sorted(n for n in ranking if n >= 0) == visible.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_stages_are_the_whole(device, mode):
    q, k, v = random_inputs(device, 300, 900)
    window = {"window": 200}
    peak, mass = scores_of(q, k, **window)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    needs = proxyattn.estimate_shares(q, k, **window)
    if mode == "last_block":
        mass, needs = None, proxyattn.estimate_budgets(q, k, 0.5, **window)
    settings = {"gamma": 0.5, "min_budget": 0, "budget_mode": mode, **window}
    lists = proxyattn.select_blocks(peak, mass, needs, 300, 900, 4, **settings)
    for got, want in zip(lists, proxyattn.choose_blocks(q, k, **settings), strict=True):
        assert torch.equal(got, want)
    out, lse = proxyattn.block_sparse_attention(q, k, v, *lists, return_lse=True, **window)
    whole = proxyattn.proxy_attention(q, k, v, **settings, return_lse=True)
    assert_same_bits(out, whole[0])
    assert_same_bits(lse, whole[1])


WHOLE_AXES = {
    "lengths": CAUSAL + LONGER,
    "window": ALL_WINDOWS,
    "heads": ((4, 4, 2), (8, 2, 4), (7, 1, 1), (6, 3, 6)),
    "head_dim": HEAD_DIMS,
    "block_size": (64, 128),
    "mode": MODES,
    "gamma": (0.3, 0.8),
    "forcing": ((0, 1, 1), (0, 0, 0), (100, 2, 2)),
    "sink": (None, 1.5),
    "dtype": DTYPES,
}


@pytest.mark.parametrize("case", balanced(WHOLE_AXES, 72, seed=14), ids=str)
def test_attention_to_what_is_chosen(device, case):
    (q_len, kv_len), block_size, window = case["lengths"], case["block_size"], case["window"]
    torch.manual_seed(q_len)
    tensors = random_inputs(
        device, q_len, kv_len, case["heads"][:2], case["dtype"], case["head_dim"]
    )
    settings = {
        "window": window,
        "gamma": case["gamma"],
        "block_size": block_size,
        "budget_mode": case["mode"],
        "num_proxy_heads": case["heads"][2],
        **dict(zip(("min_budget", *FORCED), case["forcing"], strict=True)),
    }
    sinks = sinks_of(case["sink"], case["heads"][0], device)
    lists = proxyattn.choose_blocks(*tensors[:2], **settings)
    for m in range(-(-q_len // block_size)):
        seen = len(visible_blocks(m, q_len, kv_len, block_size, True, window))
        assert ((lists[1][..., m] >= 1) & (lists[1][..., m] <= seen)).all()
    out, lse = proxyattn.proxy_attention(*tensors, **settings, sink_logits=sinks, return_lse=True)
    assert_right(out, lse, tensors, lists, block_size, window, sinks)


@pytest.mark.parametrize("window", [1, 64, 200, 2**62])
def test_min_budget_that_covers_the_window_reads_all(device, window):
    q, k, v = random_inputs(device, 300, 900)
    settings = {"window": window, "return_lse": True}
    out, _ = proxyattn.proxy_attention(q, k, v, gamma=0.1, min_budget=2**40, **settings)
    want, _ = proxyattn.proxy_attention(q, k, v, gamma=1.0, **settings)
    assert_same_bits(out, want)


@pytest.mark.parametrize("window", [1, 130, 700])
def test_a_small_workspace_changes_nothing(device, window):
    """Query blocks taken one by one."""
    tensors = random_inputs(device, 500, 1100)
    settings = {"gamma": 0.6, "min_budget": 0, "window": window, "return_lse": True}
    arguments = dict(zip("qkv", tensors, strict=True)) | settings
    want = proxyattn.proxy_attention(**arguments)
    limit = smallest_workspace(arguments)
    got = proxyattn.proxy_attention(**arguments, max_workspace_bytes=limit)
    for first, second in zip(got, want, strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("window", [1, 100, 300, 1000])
@pytest.mark.parametrize("block_size", [64, 128])
def test_chunks_choose_what_the_whole_prompt_would(device, window, block_size):
    """With shares given, cut at a block."""
    q, k, _ = random_inputs(device, 1021, 1021)
    settings = {"gamma": 0.7, "min_budget": 0, "block_size": block_size, "window": window}
    shares = torch.rand(2, 4).to(device)
    lists = proxyattn.choose_blocks(q, k, **settings, shares=shares)
    peak, mass = map(to_numpy, scores_of(q, k, block_size=block_size, window=window))
    for first, end in ((0, 384), (384, 640), (640, 1021)):
        indices, counts = proxyattn.choose_blocks(
            q[:, first:end], k[:, :end], **settings, shares=shares
        )
        rows, blocks = slice(first // block_size, -(-end // block_size)), -(-end // block_size)
        want, seen = lists[0][:, :, rows, :blocks], peak[:, :, rows, :blocks]
        if device == "cpu":
            assert torch.equal(indices, want) and torch.equal(counts, lists[1][:, :, rows])
            continue
        # Keys of other numbers are worked on in other pieces.
        assert_same_rankings(indices, to_numpy(want), seen)
        rankings = to_numpy(indices).astype(int)
        masses = mass[:, :, rows, :blocks]
        geometry = (end - first, end, block_size, True)
        scored = (rankings, masses, to_numpy(shares), geometry, 0.7)
        assert_top_p_counts(counts, *scored, window=window)
