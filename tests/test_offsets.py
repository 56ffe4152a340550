"""Offsets beyond 2^31 elements: small tensors whose strides are huge."""

import proxyattn
import pytest
import torch
from tolerance import assert_same_bits

pytestmark = pytest.mark.usefixtures("much_memory")

#: Distances in elements of neighbouring batch entries, tokens and heads. Memory that no row lies in
#: is reserved but never touched.
STRIDES = {
    "batch": (2**31 + 64, 512, 64),
    "token": (64, 2**24 + 64, 192),
    "head": (64, 192, 2**30 + 64),
}
SHAPE = {"batch": (3, 150, 4), "token": (2, 150, 4), "head": (2, 150, 4)}


def far_apart(values, strides):
    """The same values at these strides, in memory of its own."""
    last = sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    whole = torch.empty(last + 1, dtype=values.dtype, device=values.device)
    view = whole.as_strided(values.shape, strides)
    view.copy_(values)
    assert last > 2**31
    return view


def assert_equal_or_close(first, second):
    """A GPU may take another kernel for such strides, with other roundings."""
    if first.device.type == "cpu":
        assert_same_bits(first, second)
    else:
        torch.testing.assert_close(first, second, atol=4e-3, rtol=0)


@pytest.mark.parametrize("far", ["q", "k", "v"])
@pytest.mark.parametrize("axis", list(STRIDES))
def test_huge_strides(device, axis, far):
    batch, tokens, heads = SHAPE[axis]
    near = {name: torch.randn(batch, tokens, heads, 64).half().to(device) for name in "qkv"}
    spread = {**near, far: far_apart(near[far], (*STRIDES[axis], 1))}
    settings = {"gamma": 0.5, "min_budget": 0}
    want = proxyattn.proxy_attention(**near, **settings, return_lse=True)
    got = proxyattn.proxy_attention(**spread, **settings, return_lse=True)
    for first, second in zip(got, want, strict=True):
        assert_equal_or_close(first, second)


@pytest.mark.parametrize("axis", list(STRIDES))
def test_huge_strides_of_proxies(device, axis):
    batch, tokens, heads = SHAPE[axis]
    q, k = (torch.randn(batch, tokens, heads, 64).half().to(device) for _ in range(2))
    settings = (tokens * 4, tokens * 4, 4, 64, True, None, True)
    want = proxyattn.score_blocks(q, k, *settings)
    for pair in [(far_apart(q, (*STRIDES[axis], 1)), k), (q, far_apart(k, (*STRIDES[axis], 1)))]:
        for first, second in zip(proxyattn.score_blocks(*pair, *settings), want, strict=True):
            assert_equal_or_close(first, second)


def test_outputs_beyond_2_31_elements(cuda):
    """4.3 GB of output, most of it from rows that read nothing; left to GPUs for its size."""
    tokens = 2**31 // (32 * 256) + 128
    q = torch.zeros(1, tokens, 32, 256, dtype=torch.bfloat16, device=cuda)
    k = torch.randn(1, 128, 1, 256).bfloat16().to(cuda)
    rows = -(-tokens // 128)
    lists = torch.zeros(1, 1, rows, 1, dtype=torch.int32, device=cuda)
    counts = torch.zeros(1, 32, rows, dtype=torch.int32, device=cuda)
    counts[..., -1] = 1
    out, lse = proxyattn.block_sparse_attention(
        q, k, k, lists, counts, 128, causal=False, return_lse=True
    )
    last = (rows - 1) * 128
    mean = k.float().mean(1)[0, 0]
    assert out[:, :last].count_nonzero() == 0
    torch.testing.assert_close(
        out[0, last:].float(), mean.expand(tokens - last, 32, 256), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(
        lse[0, :, last:], torch.full_like(lse[0, :, last:], 128.0).log(), atol=1e-5, rtol=0
    )
    assert (lse[..., :last] == -torch.inf).all()


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [64, 128])
def test_a_million_tokens(cuda, block_size, monkeypatch):
    """Four heads over one of keys, beyond 2^31 elements of their storage, worked through in pieces:
    against the stages one by one, the last by the kernels for every device."""
    tokens = 2**20
    storage = torch.empty(1, tokens, 18, 128, dtype=torch.float16, device=cuda).normal_()
    q, k, v = storage.split((16, 1, 1), dim=2)
    q = q[:, :, 12:]
    out, lse = proxyattn.proxy_attention(
        q,
        k,
        v,
        gamma=0.05,
        stride=8,
        block_size=block_size,
        min_budget=0,
        return_lse=True,
        max_workspace_bytes=2**29,
    )
    settings = (tokens, tokens, 8, block_size, True, None)
    peak, mass = proxyattn.score_blocks(*proxyattn.pool_heads(q, k, 4, 8), *settings, True)
    shares = proxyattn.estimate_shares(q, k, block_size)
    lists = proxyattn.select_blocks(
        peak, mass, shares, tokens, tokens, 4, block_size, gamma=0.05, min_budget=0
    )
    del peak, mass
    monkeypatch.setenv("PROXYATTN_FAMILY", "sm80")
    want, want_lse = proxyattn.block_sparse_attention(q, k, v, *lists, block_size, return_lse=True)
    torch.testing.assert_close(out, want, atol=4e-3, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=0)
