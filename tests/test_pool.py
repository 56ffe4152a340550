"""pool_heads: means over the heads of each proxy and over windows of tokens."""

from dataclasses import dataclass

import numpy as np
import plain
import proxyattn
import pytest
import torch
from inputs import (
    DTYPES,
    HALF_DTYPES,
    HEAD_DIMS,
    HEADS,
    LAYOUTS,
    balanced,
    lay_out,
    name_of,
    normal,
)
from reference import pool as reference
from tolerance import FP32_UNIT, assert_close, assert_same_bits, to_numpy

POOLINGS = ("mean", "first")


def constant_heads(rows, dtype, device):
    """[1, tokens, heads, 64] whose vector for (token, head) is rows[token][head] throughout."""
    x = torch.tensor(rows, dtype=dtype, device=device)
    return x[None, :, :, None].expand(1, *x.shape, 64).contiguous()


Q_ROWS = [[1, 2, 3, 6], [9, 0, 1, 2], [-1, 1, 0, 8], [3, 5, 4, 4], [5, 5, 2, 4]]
K_ROWS = [[1, 4], [3, 2], [-3, 2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("pooling", "proxies", "q_proxy", "k_proxy"),
    [
        ("mean", 1, [[3], [3], [4]], [[2.5], [-0.5]]),
        ("mean", 2, [[3, 3], [2, 4], [5, 3]], [[2, 3], [-3, 2]]),
        ("mean", 4, [[5, 1, 2, 4], [1, 3, 2, 6], [5, 5, 2, 4]], [[2, 3], [-3, 2]]),
        ("first", 1, [[3], [2], [4]], [[2.5], [-0.5]]),
        ("first", 2, [[1.5, 4.5], [0, 4], [5, 3]], [[1, 4], [-3, 2]]),
        ("first", 4, [[1, 2, 3, 6], [-1, 1, 0, 8], [5, 5, 2, 4]], [[1, 4], [-3, 2]]),
    ],
)
def test_literal_means(device, dtype, pooling, proxies, q_proxy, k_proxy):
    """Windows of two tokens, the last of one. Proxies below the two kv heads, as many, and above,
    where two proxies each share a kv head and there is no copy of it."""
    q, k = (constant_heads(rows, dtype, device) for rows in (Q_ROWS, K_ROWS))
    got = proxyattn.pool_heads(q, k, proxies, 2, pooling)
    assert torch.equal(got[0], constant_heads(q_proxy, dtype, device))
    assert torch.equal(got[1], constant_heads(k_proxy, dtype, device))


def test_literal_head_dim(device):
    """Elements of the head dimension are kept apart."""
    q = torch.arange(128, dtype=torch.bfloat16, device=device).view(1, 1, 2, 64)
    k = q[:, :, :1]
    for pooling in POOLINGS:
        q_proxy, k_proxy = proxyattn.pool_heads(q, k, 1, 1, pooling)
        assert q_proxy[0, 0, 0].tolist() == [32 + d for d in range(64)]
        assert k_proxy[0, 0, 0].tolist() == list(range(64))


def test_literal_windows_start_at_token_zero(device):
    """Of the call for queries, of the sequence for keys; the last window may be short."""
    tokens = torch.arange(11, dtype=torch.float16, device=device)
    x = tokens[None, :, None, None].expand(1, 11, 1, 64).contiguous()

    def pooled(q, k, stride, pooling):
        proxies = proxyattn.pool_heads(q, k, 1, stride, pooling)
        return [proxy[0, :, 0, 0].tolist() for proxy in proxies]

    assert pooled(x, x[:, :9], 8, "mean") == [[3.5, 9], [3.5, 8]]
    assert pooled(x, x[:, :9], 8, "first") == [[0, 8], [0, 8]]
    assert pooled(x[:, 2:], x[:, :8], 4, "mean") == [[3.5, 7.5, 10], [1.5, 5.5]]
    assert pooled(x[:, 2:], x[:, :8], 4, "first") == [[2, 6, 10], [0, 4]]


def test_literal_rounds_once(device):
    """256 + 1 + 1 + 2 is 260; a sum in bfloat16 would be 258, for 256 + 1 gives 256 there."""
    q = constant_heads([[256, 1, 1, 2]], torch.bfloat16, device)
    q_proxy, _ = proxyattn.pool_heads(q, q, 1, 1)
    assert q_proxy[0, 0, 0, 0].item() == 65.0
    # The same over the tokens of a window, and over both.
    q_proxy, _ = proxyattn.pool_heads(*[q.transpose(1, 2).contiguous()] * 2, 1, 4)
    assert q_proxy[0, 0, 0, 0].item() == 65.0
    both = constant_heads([[256, 1], [1, 2]], torch.bfloat16, device)
    q_proxy, _ = proxyattn.pool_heads(both, both, 1, 2)
    assert q_proxy[0, 0, 0, 0].item() == 65.0
    # The mean of 1 and 1 + 2^-7, neighbours in bfloat16, lies half way: ties to even give 1.
    q = constant_heads([[1, 1.0078125]], torch.bfloat16, device)
    q_proxy, _ = proxyattn.pool_heads(q, q, 1, 1)
    assert q_proxy[0, 0, 0, 0].item() == 1.0


def test_literal_defaults(device):
    """Means over windows of four; as many proxies as there are kv heads if those are four or more,
    else the smallest multiple that divides the query heads and is four or more, else all of them.
    """
    for (q_heads, kv_heads), proxies in {
        (8, 8): 8,
        (32, 8): 8,
        (16, 4): 4,
        (8, 2): 4,
        (28, 2): 4,
        (12, 3): 6,
        (14, 2): 14,
        (28, 1): 4,
        (10, 1): 5,
        (7, 1): 7,
        (6, 2): 6,
        (9, 3): 9,
        (3, 3): 3,
        (2, 1): 2,
        (1, 1): 1,
    }.items():
        q, k = (
            torch.randn(1, 9, heads, 64).to(torch.bfloat16).to(device)
            for heads in (q_heads, kv_heads)
        )
        for got, want in zip(
            proxyattn.pool_heads(q, k),
            proxyattn.pool_heads(q, k, proxies, 4, "mean"),
            strict=True,
        ):
            assert torch.equal(got, want), (q_heads, kv_heads)


@dataclass(frozen=True)
class Case:
    batch: int
    q_len: int
    kv_len: int
    heads: tuple
    head_dim: int
    stride: int
    pooling: str
    dtype: torch.dtype
    q_layout: str
    k_layout: str

    def __str__(self):
        heads = "x".join(map(str, self.heads))
        return (
            f"b{self.batch}-m{self.q_len}-n{self.kv_len}-h{heads}-d{self.head_dim}-s{self.stride}-"
            f"{self.pooling}-{name_of(self.dtype)}-{self.q_layout}-{self.k_layout}"
        )


LENGTH_VALUES = (1, 2, 3, 7, 8, 9, 31, 63, 64, 65, 127, 129)


def cases(count, seed):
    axes = {
        "batch": (1, 3),
        "q_len": LENGTH_VALUES,
        "kv_len": LENGTH_VALUES,
        "heads": HEADS,
        "head_dim": HEAD_DIMS,
        "stride": (1, 2, 4, 8),
        "pooling": POOLINGS,
        "dtype": DTYPES,
        "q_layout": LAYOUTS,
        "k_layout": LAYOUTS,
    }
    return [Case(**values) for values in balanced(axes, count, seed)]


def check(case, device):
    rng = np.random.default_rng([case.q_len, case.kv_len, case.head_dim])
    q_heads, kv_heads, proxies = case.heads
    inputs = [
        normal(rng, (case.batch, tokens, heads, case.head_dim), case.dtype)
        for tokens, heads in ((case.q_len, q_heads), (case.kv_len, kv_heads))
    ]
    tensors = [
        lay_out(x, case.dtype, device, layout)
        for x, layout in zip(inputs, (case.q_layout, case.k_layout), strict=True)
    ]
    settings = (case.stride, case.pooling)
    actual = proxyattn.pool_heads(*tensors, proxies, *settings)
    expected = reference.pool_heads(*inputs, proxies, *settings)
    for name, got, want, tensor, x in zip(
        ("q_proxy", "k_proxy"), actual, expected, tensors, inputs, strict=True
    ):
        assert got.dtype == case.dtype and got.is_contiguous()
        if case.dtype in HALF_DTYPES:  # in fp32 the bound below says it all
            assert_close(got, want, plain.pool(tensor, want.shape[2], *settings), name)
        num_terms = x.shape[2] // want.shape[2] * case.stride
        assert_rounded_once(got, want, num_terms * FP32_UNIT * np.abs(x).max(), name)


def assert_rounded_once(got, want, slack, name):
    """A mean in fp32 that is off by the slack at most, then one rounding, which keeps order."""
    low, high = (to_numpy(torch.from_numpy(want + e).to(got.dtype)) for e in (-slack, slack))
    got = to_numpy(got)
    assert np.all((low <= got) & (got <= high)), f"{name} is rounded more than once"


@pytest.mark.parametrize("case", cases(200, seed=1), ids=str)
def test_reference(device, case):
    check(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(1500, seed=2), ids=str)
def test_reference_sweep(device, case):
    check(case, device)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
def test_empty(device, shape, pooling):
    batch, q_len, kv_len = shape
    q = torch.zeros(batch, q_len, 4, 64, dtype=torch.bfloat16, device=device)
    k = torch.zeros(batch, kv_len, 2, 64, dtype=torch.bfloat16, device=device)
    q_proxy, k_proxy = proxyattn.pool_heads(q, k, 4, 2, pooling)
    assert q_proxy.shape == (batch, -(-q_len // 2), 4, 64)
    assert k_proxy.shape == (batch, -(-kv_len // 2), 2, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_special_values_stay_in_their_element(device, dtype, pooling):
    q = torch.ones(1, 9, 2, 64, dtype=dtype, device=device)
    q[0, 0, 0, 3] = torch.nan
    q[0, 2, 1, 5] = torch.inf
    q[0, 4, 0, 7], q[0, 4, 1, 7] = torch.inf, -torch.inf
    q[0, 7, 0, 9] = torch.nan  # not the first of its window
    q[0, 8, 0, 1] = torch.nan  # a window of its own
    nans = [[0, 0, 0, 3], [0, 2, 0, 7], [0, 4, 0, 1]]
    if pooling == "mean":
        nans.insert(2, [0, 3, 0, 9])
    for pooled in proxyattn.pool_heads(q, q, 1, 2, pooling):
        assert pooled.isnan().nonzero().tolist() == nans
        assert pooled.isposinf().nonzero().tolist() == [[0, 1, 0, 5]]


def test_fp16_sum_of_large_heads_does_not_overflow(device):
    q = torch.full((1, 8, 8, 64), 65000.0, dtype=torch.float16, device=device)
    q_proxy, _ = proxyattn.pool_heads(q, q, 1, 8)
    assert torch.equal(q_proxy, q[:, :1, :1])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_expanded_batch_and_heads(device, pooling):
    """Strides of zero are strides."""
    x = torch.randn(1, 9, 1, 64).to(torch.bfloat16).to(device)
    q, k = x.expand(3, 9, 4, 64), x.expand(3, 9, 2, 64)
    q_proxy, k_proxy = proxyattn.pool_heads(q, k, 2, 4, pooling)
    want, _ = proxyattn.pool_heads(x, x, 1, 4, pooling)
    want = want.expand(3, 3, 2, 64)
    assert torch.equal(q_proxy, want) and torch.equal(k_proxy, want)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_same_bits_every_time(device, dtype, pooling, set_threads):
    q = torch.randn(2, 777, 8, 128).to(dtype).to(device)
    k = torch.randn(2, 901, 4, 128).to(dtype).to(device)
    first = proxyattn.pool_heads(q, k, 2, 2, pooling)
    for threads in (1, 2, 3):
        set_threads(threads)
        for got, want in zip(proxyattn.pool_heads(q, k, 2, 2, pooling), first, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("proxies", [1, 2, 4])
def test_rows_are_independent(device, pooling, proxies):
    """A window's mean has the same bits whatever stands beside it."""
    q = torch.randn(2, 300, 4, 64).to(torch.bfloat16).to(device)
    k = q[:, :, :2]
    whole = proxyattn.pool_heads(q, k, proxies, 4, pooling)
    part = proxyattn.pool_heads(q[1:, 100:204], k[1:, :204], proxies, 4, pooling)
    assert torch.equal(part[0], whole[0][1:, 25:51])
    assert torch.equal(part[1], whole[1][1:, :51])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)], ids=["tokens", "batch"])
def test_70000_rows(device, shape, pooling):
    x = torch.randn(*shape, 2, 64).to(torch.bfloat16).to(device)
    for got in proxyattn.pool_heads(x, x, 1, 1, pooling):
        assert torch.equal(got, x.float().mean(2, keepdim=True).to(torch.bfloat16))
