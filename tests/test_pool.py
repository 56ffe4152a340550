"""pool_heads: means over a proxy group's heads at the first token of every stride window."""

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


def constant_heads(rows, dtype, device):
    """[1, tokens, heads, 64] whose vector for (token, head) is rows[token][head] throughout."""
    x = torch.tensor(rows, dtype=dtype, device=device)
    return x[None, :, :, None].expand(1, *x.shape, 64).contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_literal_means(device, dtype):
    q = constant_heads(
        [[1, 2, 3, 6], [90, 90, 90, 90], [-1, 1, 0, 8], [90, 90, 90, 90], [5, 5, 2, 4]],
        dtype,
        device,
    )
    k = constant_heads([[1, 4], [90, 90], [-3, 2]], dtype, device)

    q_proxy, k_proxy = proxyattn.pool_heads(q, k, num_proxy_heads=2, stride=2)
    assert torch.equal(q_proxy, constant_heads([[1.5, 4.5], [0, 4], [5, 3]], dtype, device))
    assert torch.equal(k_proxy, constant_heads([[1, 4], [-3, 2]], dtype, device))

    q_proxy, k_proxy = proxyattn.pool_heads(q, k, num_proxy_heads=1, stride=2)
    assert torch.equal(q_proxy, constant_heads([[3], [2], [4]], dtype, device))
    assert torch.equal(k_proxy, constant_heads([[2.5], [-0.5]], dtype, device))


def test_literal_head_dim(device):
    """Elements of the head dimension are kept apart."""
    q = torch.arange(128, dtype=torch.bfloat16, device=device).view(1, 1, 2, 64)
    k = q[:, :, :1]
    q_proxy, k_proxy = proxyattn.pool_heads(q, k, num_proxy_heads=1, stride=1)
    assert q_proxy[0, 0, 0].tolist() == [32 + d for d in range(64)]
    assert k_proxy[0, 0, 0].tolist() == list(range(64))


def test_literal_windows_start_at_token_zero(device):
    """The last window may be short, and its first token is kept all the same."""
    tokens = torch.arange(11, dtype=torch.float16, device=device)
    x = tokens[None, :, None, None].expand(1, 11, 1, 64).contiguous()
    q_proxy, k_proxy = proxyattn.pool_heads(x, x[:, :9], stride=8)
    assert q_proxy[0, :, 0, 0].tolist() == [0, 8]
    assert k_proxy[0, :, 0, 0].tolist() == [0, 8]
    q_proxy, k_proxy = proxyattn.pool_heads(x[:, 2:], x[:, :8], stride=4)
    assert q_proxy[0, :, 0, 0].tolist() == [2, 6, 10]
    assert k_proxy[0, :, 0, 0].tolist() == [0, 4]


def test_literal_rounds_once(device):
    """256 + 1 + 1 + 2 is 260; a sum in bfloat16 would be 258, for 256 + 1 gives 256 there."""
    q = constant_heads([[256, 1, 1, 2]], torch.bfloat16, device)
    q_proxy, _ = proxyattn.pool_heads(q, q, num_proxy_heads=1, stride=1)
    assert q_proxy[0, 0, 0, 0].item() == 65.0
    # The mean of 1 and 1 + 2^-7, neighbours in bfloat16, lies half way: ties to even give 1.
    q = constant_heads([[1, 1.0078125]], torch.bfloat16, device)
    q_proxy, _ = proxyattn.pool_heads(q, q, num_proxy_heads=1, stride=1)
    assert q_proxy[0, 0, 0, 0].item() == 1.0


@dataclass(frozen=True)
class Case:
    batch: int
    q_len: int
    kv_len: int
    heads: tuple
    head_dim: int
    stride: int
    dtype: torch.dtype
    q_layout: str
    k_layout: str

    def __str__(self):
        heads = "x".join(map(str, self.heads))
        return (
            f"b{self.batch}-m{self.q_len}-n{self.kv_len}-h{heads}-d{self.head_dim}-s{self.stride}-"
            f"{name_of(self.dtype)}-{self.q_layout}-{self.k_layout}"
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
        "dtype": DTYPES,
        "q_layout": LAYOUTS,
        "k_layout": LAYOUTS,
    }
    return [Case(**values) for values in balanced(axes, count, seed)]


def check(case, device):
    rng = np.random.default_rng([case.q_len, case.kv_len, case.head_dim])
    q_heads, kv_heads, groups = case.heads
    q = normal(rng, (case.batch, case.q_len, q_heads, case.head_dim), case.dtype)
    k = normal(rng, (case.batch, case.kv_len, kv_heads, case.head_dim), case.dtype)
    tensors = [
        lay_out(q, case.dtype, device, case.q_layout),
        lay_out(k, case.dtype, device, case.k_layout),
    ]
    actual = proxyattn.pool_heads(*tensors, groups, case.stride)
    expected = reference.pool_heads(q, k, groups, case.stride)
    for name, got, want, tensor, x in zip(
        ("q_proxy", "k_proxy"), actual, expected, tensors, (q, k), strict=True
    ):
        assert got.dtype == case.dtype and got.is_contiguous()
        assert_close(got, want, plain.pool(tensor, groups, case.stride), name)
        assert_rounded_once(got, want, np.abs(x).max(), name)


def assert_rounded_once(got, want, largest, name):
    """fp32 sums of at most 16 heads, then one rounding, which keeps order."""
    slack = 16 * FP32_UNIT * largest
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


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
def test_empty(device, shape):
    batch, q_len, kv_len = shape
    q = torch.zeros(batch, q_len, 4, 64, dtype=torch.bfloat16, device=device)
    k = torch.zeros(batch, kv_len, 2, 64, dtype=torch.bfloat16, device=device)
    q_proxy, k_proxy = proxyattn.pool_heads(q, k, stride=2)
    assert q_proxy.shape == (batch, -(-q_len // 2), 2, 64)
    assert k_proxy.shape == (batch, -(-kv_len // 2), 2, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_special_values_stay_in_their_element(device, dtype):
    q = torch.ones(1, 8, 2, 64, dtype=dtype, device=device)
    q[0, 0, 0, 3] = torch.nan
    q[0, 2, 1, 5] = torch.inf
    q[0, 4, 0, 7], q[0, 4, 1, 7] = torch.inf, -torch.inf
    q[0, 1] = torch.nan  # not sampled
    q_proxy, k_proxy = proxyattn.pool_heads(q, q, num_proxy_heads=1, stride=2)
    for pooled in (q_proxy, k_proxy):
        assert pooled.isnan().nonzero().tolist() == [[0, 0, 0, 3], [0, 2, 0, 7]]
        assert pooled.isposinf().nonzero().tolist() == [[0, 1, 0, 5]]


def test_fp16_sum_of_large_heads_does_not_overflow(device):
    q = torch.full((1, 4, 8, 64), 65000.0, dtype=torch.float16, device=device)
    q_proxy, _ = proxyattn.pool_heads(q, q, num_proxy_heads=1, stride=1)
    assert torch.equal(q_proxy, q[:, :, :1])


def test_expanded_batch_and_heads(device):
    """Strides of zero are strides."""
    x = torch.randn(1, 9, 1, 64).to(torch.bfloat16).to(device)
    q, k = x.expand(3, 9, 4, 64), x.expand(3, 9, 2, 64)
    q_proxy, k_proxy = proxyattn.pool_heads(q, k, stride=4)
    want = x[:, ::4].expand(3, 3, 2, 64)
    assert torch.equal(q_proxy, want) and torch.equal(k_proxy, want)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_same_bits_every_time(device, dtype, set_threads):
    q = torch.randn(2, 777, 8, 128).to(dtype).to(device)
    k = torch.randn(2, 901, 4, 128).to(dtype).to(device)
    first = proxyattn.pool_heads(q, k, 2, 2)
    for threads in (1, 2, 3):
        set_threads(threads)
        for got, want in zip(proxyattn.pool_heads(q, k, 2, 2), first, strict=True):
            assert_same_bits(got, want)


def test_rows_are_independent(device):
    """A token's mean is the same whatever stands beside it."""
    q = torch.randn(2, 300, 4, 64).to(torch.bfloat16).to(device)
    whole, _ = proxyattn.pool_heads(q, q, 2, 4)
    part, _ = proxyattn.pool_heads(q[1:, 100:201], q[1:], 2, 4)
    assert torch.equal(part, whole[1:, 25:51])


@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)], ids=["tokens", "batch"])
def test_70000_rows(device, shape):
    x = torch.randn(*shape, 2, 64).to(torch.bfloat16).to(device)
    q_proxy, k_proxy = proxyattn.pool_heads(x, x, 1, 1)
    want = x.float().mean(2, keepdim=True).to(torch.bfloat16)
    assert torch.equal(q_proxy, want) and torch.equal(k_proxy, want)
