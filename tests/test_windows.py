"""Windows and sinks in attention: what a query sees of its lists, and the column that joins it.
What windows do to the choice of blocks is for test_window_stages.py and test_window_choice.py."""

import numpy as np
import plain
import proxyattn
import pytest
import torch
from arguments import good_arguments, message_of
from chain import random_inputs
from inputs import DTYPES, HEAD_DIMS, LENGTHS, balanced, lay_out, normal
from packs import random_lists, random_pack
from reference import attention as reference
from reference.grid import positions, visible_pairs
from scores import MODES
from tolerance import assert_close, assert_same_bits, assert_within, fp32_attention_errors, to_numpy

CAUSAL = tuple((q_len, kv_len) for q_len, kv_len, causal in LENGTHS if causal)
#: One key, about a block, blocks and more, all keys and one fewer, and more than anybody has.
WINDOWS = (1, 2, 63, 64, 65, 100, 128, 190, 191, 2**62)
#: Row tiles of several query blocks, chunks of several key tiles, and queries behind a prefix, for
#: the choice of blocks, and windows that cut them.
LONGER = ((300, 900), (1000, 1000), (200, 2500))
ALL_WINDOWS = (*WINDOWS, 400, 700)
#: Without a sink, one that nothing reaches, usual ones, and one that takes all there is.
SINKS = (None, -torch.inf, 0.0, 2.5, 60.0)


def sinks_of(value, heads, device):
    """One head's sink of this logit, the others' around it."""
    if value is None:
        return None
    logits = torch.linspace(-2, 3, heads)
    logits[0] = value
    return logits.to(device)


def every_block(batch, heads, q_len, kv_len, block_size, device):
    rows, blocks = (-(-n // block_size) for n in (q_len, kv_len))
    indices = torch.arange(blocks, dtype=torch.int32, device=device).expand(batch, 1, rows, -1)
    return indices, torch.full((batch, heads, rows), blocks, dtype=torch.int32, device=device)


def plain_attention(q, k, v, seen, sinks):
    """The formula in plain torch: a sink is a key of this logit and of no value."""
    if sinks is None:
        return plain.attention(q, k, v, seen)
    scale = q.shape[-1] ** -0.5
    heads = q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    logits = (plain.matmul(q, k.transpose(2, 3)) * scale).masked_fill(~seen, -torch.inf)
    column = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1].nan_to_num(0.0)
    return plain.matmul(weights, v).transpose(1, 2)


def assert_right(out, lse, tensors, lists, block_size, window, sinks):
    """out and lse are those of the formula for these lists."""
    q, k, v = (to_numpy(x) for x in tensors)
    want, want_lse = reference.block_sparse_attention(
        q,
        k,
        v,
        *(x.cpu().numpy() for x in lists),
        block_size,
        True,
        window=window,
        sink_logits=None if sinks is None else to_numpy(sinks),
    )
    out_error, lse_error = fp32_attention_errors(q, k, v, want_lse)
    assert_within(lse, want_lse, lse_error, "lse")
    if out.dtype == torch.float32:
        assert_within(out, want, out_error, "out")
        return
    q_len, kv_len = q.shape[1], k.shape[1]
    seen = plain.seen_keys(*lists, q_len, kv_len, block_size, True)
    within = visible_pairs(positions(q_len, kv_len), np.arange(kv_len), True, window)
    seen = seen & torch.from_numpy(within).to(seen.device)
    assert_close(out, want, plain_attention(*tensors, seen, sinks), "out")


AXES = {
    "lengths": CAUSAL,
    "window": WINDOWS,
    "sink": SINKS,
    "heads": ((4, 4, 2), (8, 2, 8), (7, 1, 1), (6, 2, 3)),
    "head_dim": HEAD_DIMS,
    "block_size": (64, 128),
    "dtype": DTYPES,
}


@pytest.mark.parametrize("case", balanced(AXES, 80, seed=3), ids=str)
def test_attention_to_lists(device, case):
    (q_len, kv_len), window, block_size = case["lengths"], case["window"], case["block_size"]
    q_heads, kv_heads, list_heads = case["heads"]
    rng = np.random.default_rng([q_len, kv_len, case["head_dim"]])
    tensors = [
        lay_out(normal(rng, (2, n, heads, case["head_dim"]), case["dtype"]), case["dtype"], device)
        for n, heads in ((q_len, q_heads), (kv_len, kv_heads), (kv_len, kv_heads))
    ]
    rows, blocks = (-(-n // block_size) for n in (q_len, kv_len))
    order = rng.random((2, list_heads, rows, blocks)).argsort(axis=-1)
    counts = rng.integers(0, blocks + 1, size=(2, q_heads, rows))
    lists = [torch.from_numpy(x).to(device, torch.int32) for x in (order, counts)]
    sinks = sinks_of(case["sink"], q_heads, device)
    out, lse = proxyattn.block_sparse_attention(
        *tensors,
        *lists,
        block_size,
        return_lse=True,
        window=window,
        sink_logits=sinks,
    )
    assert_right(out, lse, tensors, lists, block_size, window, sinks)


@pytest.mark.parametrize("case", balanced(AXES, 40, seed=4), ids=str)
def test_a_call_without_a_selection(device, case):
    """Dense inside the window: what a list of all blocks gives, too."""
    (q_len, kv_len), window = case["lengths"], case["window"]
    heads = case["heads"][:2]
    torch.manual_seed(q_len)
    tensors = random_inputs(device, q_len, kv_len, heads, case["dtype"], case["head_dim"])
    sinks = sinks_of(case["sink"], heads[0], device)
    out, lse = proxyattn.proxy_attention(
        *tensors, gamma=1.0, window=window, sink_logits=sinks, return_lse=True
    )
    lists = every_block(2, heads[0], q_len, kv_len, 128, device)
    assert_right(out, lse, tensors, lists, 128, window, sinks)


def test_a_window_by_hand(device):
    """Three keys of equal logits, values 1, 3 and 8; a window of two, and a sink of logit 0."""
    q = torch.zeros(1, 3, 2, 64, dtype=torch.bfloat16, device=device)
    k = torch.zeros(1, 3, 1, 64, dtype=torch.bfloat16, device=device)
    values = torch.tensor([1.0, 3.0, 8.0], dtype=torch.bfloat16, device=device)
    v = values[None, :, None, None].expand(1, 3, 1, 64).contiguous()
    sinks = torch.tensor([-torch.inf, 0.0], device=device)
    out, lse = proxyattn.proxy_attention(
        q, k, v, gamma=1.0, window=2, sink_logits=sinks, return_lse=True
    )
    assert out[0, :, 0, 0].tolist() == [1.0, 2.0, 5.5]
    np.testing.assert_allclose(to_numpy(out[0, :, 1, 0]), [1 / 2, 4 / 3, 11 / 3], rtol=2**-8)
    np.testing.assert_allclose(to_numpy(lse[0]), np.log([[1, 2, 2], [2, 3, 3]]), rtol=1e-6)


def test_a_row_without_keys_has_the_sink_alone(device):
    q, k, v = random_inputs(device, 100, 200)
    indices = torch.zeros(2, 1, 2, 4, dtype=torch.int32, device=device)
    counts = torch.zeros(2, 4, 2, dtype=torch.int32, device=device)
    sinks = torch.tensor([0.5, -torch.inf, 2.0, -3.0], device=device)
    out, lse = proxyattn.block_sparse_attention(
        q, k, v, indices, counts, return_lse=True, sink_logits=sinks
    )
    assert not out.any()
    torch.testing.assert_close(lse, sinks[None, :, None].expand_as(lse))


@pytest.mark.parametrize("window", [2**62, 300])
def test_a_window_that_hides_nothing_changes_no_bit(device, window, monkeypatch):
    """In the family of kernels that chooses inside windows."""
    monkeypatch.setenv("PROXYATTN_FAMILY", "sm80" if device == "cuda" else "")
    tensors = random_inputs(device, 200, 300)
    for settings in ({"gamma": 0.6, "min_budget": 0}, {"gamma": 1.0}):
        plain_out, plain_lse = proxyattn.proxy_attention(*tensors, **settings, return_lse=True)
        out, lse = proxyattn.proxy_attention(*tensors, **settings, window=window, return_lse=True)
        assert_same_bits(out, plain_out)
        assert_same_bits(lse, plain_lse)


def test_a_sink_that_nothing_reaches_changes_no_bit(device):
    tensors = random_inputs(device, 200, 300)
    sinks = torch.full((4,), -torch.inf, device=device)
    settings = {"gamma": 0.6, "min_budget": 0, "return_lse": True}
    without = proxyattn.proxy_attention(*tensors, **settings)
    with_sinks = proxyattn.proxy_attention(*tensors, **settings, sink_logits=sinks)
    for got, want in zip(with_sinks, without, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("gamma", [0.6, 1.0])
def test_sinks_choose_no_blocks(device, gamma):
    """The estimate goes without them: the lists are the same, and attention is that to them."""
    q, k, v = random_inputs(device, 300, 700)
    sinks = sinks_of(2.5, 4, device)
    settings = {"gamma": gamma, "min_budget": 0}
    out, lse = proxyattn.proxy_attention(q, k, v, **settings, sink_logits=sinks, return_lse=True)
    lists = proxyattn.choose_blocks(q, k, **settings)
    assert_right(out, lse, (q, k, v), lists, 64, None, sinks)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_keys_outside_the_window_are_not_read(device, gamma):
    """NaN in all that the window hides, but for the blocks at its edge."""
    q, k, v = random_inputs(device, 128, 1024)
    settings = {"gamma": gamma, "min_budget": 0, "window": 200}
    first = (1024 - 128 + 1 - 200) // 128 * 128  # key of the first block that the window touches
    want = proxyattn.proxy_attention(q, k, v, **settings)
    k[:, :first] = v[:, :first] = torch.nan
    assert_same_bits(proxyattn.proxy_attention(q, k, v, **settings), want)


# ---- packed and paged sequences


@pytest.mark.parametrize("page", [None, 16, 128])
@pytest.mark.parametrize("window", [None, 1, 100, 200])
def test_packed_sequences_are_calls_of_their_own(device, page, window):
    pack = random_pack(device, [(0, 10), (100, 100), (65, 400), (300, 200), (1, 257)], page=page)
    sinks = sinks_of(1.5, 4, device)
    settings = {"window": window, "sink_logits": sinks, "return_lse": True}
    lists = random_lists(np.random.default_rng(5), pack, 2, 4, 64)
    packed_out, packed_lse = proxyattn.block_sparse_attention_varlen(
        **pack.arguments, indices=lists[0], counts=lists[1], **settings
    )
    whole_out, whole_lse = proxyattn.proxy_attention_varlen(**pack.arguments, gamma=1.0, **settings)
    for i, (q_len, kv_len) in enumerate(pack.lengths):
        if q_len == 0:
            continue
        q, k, v = pack.sequences[i]
        tokens, rows = pack.tokens(i), pack.rows(i, 64)
        before = max(0, q_len - kv_len)  # queries that see nothing but the sink
        for out, lse in ((packed_out, packed_lse), (whole_out, whole_lse)):
            assert not out[tokens][:before].any()
            alone = lse[:, tokens][:, :before]
            torch.testing.assert_close(alone, sinks[:, None].expand_as(alone))
        if before > 0:
            continue
        own = (lists[0][None, :, rows], lists[1][None, :, rows])
        out, lse = proxyattn.block_sparse_attention(q, k, v, *own, **settings)
        assert_same_bits(packed_out[tokens], out[0])
        assert_same_bits(packed_lse[:, tokens], lse[0])
        out, lse = proxyattn.proxy_attention(q, k, v, gamma=1.0, **settings)
        assert_same_bits(whole_out[tokens], out[0])
        assert_same_bits(whole_lse[:, tokens], lse[0])


PACKED_LENGTHS = [(100, 100), (0, 300), (65, 400), (300, 200), (700, 1500), (1, 257)]


@pytest.mark.parametrize("page", [None, 16, 32, 256])
@pytest.mark.parametrize("window", [1, 64, 130, 500, 2**62])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [64, 128])
def test_packed_sequences_choose_inside_their_windows(device, page, window, mode, block_size):
    pack = random_pack(device, PACKED_LENGTHS, page=page)
    settings = {"gamma": 0.5, "min_budget": 0, "window": window}
    settings |= {"budget_mode": mode, "block_size": block_size}
    indices, counts = proxyattn.choose_blocks_varlen(**pack.estimate_arguments, **settings)
    sinks = sinks_of(1.5, 4, device)
    out, lse = proxyattn.proxy_attention_varlen(
        **pack.arguments, **settings, sink_logits=sinks, return_lse=True
    )
    for i, (q_len, kv_len) in enumerate(pack.lengths):
        if q_len == 0:
            continue
        tokens, rows = pack.tokens(i), pack.rows(i, block_size)
        if q_len > kv_len:  # no dense call takes it
            assert not out[tokens][: q_len - kv_len].any() and out[tokens].isfinite().all()
            continue
        own = (indices[:, rows, : -(-kv_len // block_size)], counts[:, rows])
        assert (indices[:, rows, own[0].shape[2] :] == -1).all()
        want = proxyattn.choose_blocks(*pack.sequences[i][:2], **settings)
        for got, alone in zip(own, want, strict=True):
            assert torch.equal(got, alone[0])
        results = out[None, tokens], lse[None, :, tokens]
        assert_right(*results, pack.sequences[i], want, block_size, window, sinks)


# ---- errors


WINDOWED = (
    "score_blocks",
    "estimate_budgets",
    "estimate_shares",
    "select_blocks",
    "block_sparse_attention",
    "choose_blocks",
    "proxy_attention",
)


@pytest.mark.parametrize("op", WINDOWED)
def test_wrong_windows(device, op):
    arguments = good_arguments(op, device)
    for window in (0, -3):
        with pytest.raises(ValueError) as error:
            getattr(proxyattn, op)(**arguments, window=window)
        assert message_of(error) == f"{op}: window must be at least 1, got window={window}"
    with pytest.raises(ValueError) as error:
        getattr(proxyattn, op)(**arguments, window=5, causal=False)
    assert message_of(error) == f"{op}: window must be None unless causal, got window=5"


@pytest.mark.parametrize("op", ["block_sparse_attention", "proxy_attention"])
def test_wrong_sinks(device, op):
    arguments = good_arguments(op, device)
    attend = getattr(proxyattn, op)
    with pytest.raises(TypeError) as error:
        attend(**arguments, sink_logits=torch.zeros(4, dtype=torch.bfloat16, device=device))
    assert message_of(error) == f"{op}: sink_logits must have dtype float32, got bfloat16"
    with pytest.raises(ValueError) as error:
        attend(**arguments, sink_logits=torch.zeros(2, device=device))
    assert message_of(error) == f"{op}: sink_logits must have shape [4], got shape [2]"
    with pytest.raises(TypeError, match=f"{op}: sink_logits must be on the device of q"):
        attend(**arguments, sink_logits=torch.zeros(4, device="meta"))
    with pytest.raises(RuntimeError, match="sink_logits must not require grad"):
        attend(**arguments, sink_logits=torch.zeros(4, device=device, requires_grad=True))
