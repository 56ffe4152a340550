"""block_sparse_attention: exact attention of each query over its chosen key blocks."""

from math import log

import numpy as np
import proxyattn
import pytest
import torch
from inputs import DTYPES, HALF_DTYPES, lay_out, name_of, normal
from reference import attention as reference
from tolerance import (
    FP32_UNIT,
    assert_close,
    assert_same_bits,
    assert_within,
    fp32_attention_errors,
)

NAN, INF = float("nan"), float("inf")


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def token_values(values, dtype, device, heads=1):
    """[1, tokens, heads, 64] whose vector for a token is values[token] throughout."""
    x = torch.tensor(values, dtype=torch.float64).to(dtype).to(device)
    return x[None, :, None, None].expand(1, len(values), heads, 64).contiguous()


def zeros(tokens, dtype, device, heads=1):
    return torch.zeros(1, tokens, heads, 64, dtype=dtype, device=device)


def causal_lists(num_blocks, device, heads=1):
    """Every visible block of equal query and key blocks."""
    lists = torch.arange(num_blocks, dtype=torch.int32).expand(1, 1, num_blocks, num_blocks)
    counts = torch.arange(1, num_blocks + 1, dtype=torch.int32).expand(1, heads, num_blocks)
    return lists.contiguous().to(device), counts.contiguous().to(device)


def random_inputs(device, q_len, kv_len, heads=(4, 2), dtype=torch.bfloat16, head_dim=64, batch=2):
    return [
        torch.randn(batch, n, h, head_dim).to(dtype).to(device)
        for n, h in ((q_len, heads[0]), (kv_len, heads[1]), (kv_len, heads[1]))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_literal_means_of_blocks(device, dtype):
    """Equal logits: the output is the mean value of the chosen blocks, the log-sum their size."""
    q, k = zeros(1, dtype, device), zeros(192, dtype, device)
    v = token_values([1.0] * 64 + [2.0] * 64 + [6.0] * 64, dtype, device)
    for blocks, mean in [([0], 1), ([1], 2), ([2], 6), ([1, 0], 1.5), ([2, 1], 4), ([1, 2, 0], 3)]:
        out, lse = proxyattn.block_sparse_attention(
            q,
            k,
            v,
            int32([[[blocks]]], device),
            int32([[[len(blocks)]]], device),
            64,
            causal=False,
            return_lse=True,
        )
        assert out.shape == (1, 1, 1, 64) and out.dtype == dtype
        assert_within(out, np.full((1, 1, 1, 64), mean, dtype=float), 1e-6 * mean)
        assert_within(lse, np.array([[[log(64 * len(blocks))]]]), 1e-6)


def test_literal_weights(device):
    """Two keys with logits 0 and log 3: weights 1/4 and 3/4 of values 0 and 16, log-sum log 4."""
    q = zeros(1, torch.float16, device)
    q[..., 0] = 1
    k = zeros(2, torch.float16, device)
    k[0, 1, 0, 0] = 1
    v = token_values([0.0, 16.0], torch.float16, device)
    out, lse = proxyattn.block_sparse_attention(
        q,
        k,
        v,
        int32([[[[0]]]], device),
        int32([[[1]]], device),
        64,
        causal=False,
        scale=log(3),
        return_lse=True,
    )
    assert_within(out, np.full((1, 1, 1, 64), 12.0), 12 * 2**-10)
    assert_within(lse, np.array([[[log(4)]]]), 1e-6)


def test_literal_causal_prefix_means(device):
    """Equal logits, values 0, 1, 2, ...: query i gets i / 2; with its own block alone the mean of
    the block's start and i."""
    q = k = zeros(130, torch.float16, device)
    v = token_values(list(range(130)), torch.float16, device)
    lists, counts = causal_lists(3, device)
    out, lse = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64, return_lse=True)
    tokens = np.arange(130)
    assert_within(out[0, :, 0, 0], tokens / 2, 65 * 2**-10)
    assert_within(lse[0, 0], np.log(tokens + 1), 1e-6)

    own = int32([[[[0], [1], [2]]]], device)
    out, lse = proxyattn.block_sparse_attention(
        q, k, v, own, int32([[[1, 1, 1]]], device), 64, return_lse=True
    )
    start = tokens // 64 * 64
    assert_within(out[0, :, 0, 0], (start + tokens) / 2, 130 * 2**-10)
    assert_within(lse[0, 0], np.log(tokens - start + 1), 1e-6)


def test_literal_bottom_right(device):
    """Two queries after 66 keys of 68: they see 67 and 68."""
    q, k = zeros(2, torch.bfloat16, device), zeros(68, torch.bfloat16, device)
    _, lse = proxyattn.block_sparse_attention(
        q, k, k, int32([[[[1, 0]]]], device), int32([[[2]]], device), 64, return_lse=True
    )
    assert_within(lse, np.log([[[67.0, 68.0]]]), 1e-6)


def test_literal_lists_of_head_groups(device):
    """Four query heads, two key heads, and lists that two heads share but for their counts."""
    q, k = zeros(1, torch.float16, device, 4), zeros(128, torch.float16, device, 2)
    v = zeros(128, torch.float16, device, 2)
    v[0, :64, 0], v[0, 64:, 0], v[0, :64, 1], v[0, 64:, 1] = 1, 3, 10, 30
    lists = int32([[[[1, 0]], [[0, 1]]]], device)
    counts = int32([[[1], [2], [1], [2]]], device)
    out, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64, causal=False)
    assert out[0, 0, :, 0].tolist() == [3, 2, 10, 20]


def test_literal_nothing_to_see(device):
    """No block chosen, or none of the chosen visible: zeros and -inf, in those rows alone."""
    q, k = zeros(128, torch.bfloat16, device, 2), zeros(128, torch.bfloat16, device)
    v = token_values([5.0] * 128, torch.bfloat16, device)
    lists = int32([[[[1, 0], [0, 1]]]], device)  # query block 0 lists block 1 first, its future
    counts = int32([[[1, 0], [2, 1]]], device)
    out, lse = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64, return_lse=True)
    assert (out[0, :, 0] == 0).all() and (lse[0, 0] == -INF).all()
    assert (out[0, :, 1] == 5).all() and lse[0, 1].isfinite().all()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len", "causal"),
    [(0, 100, 200, True), (2, 0, 200, True), (2, 0, 0, True), (2, 100, 0, False)],
)
def test_empty(device, batch, q_len, kv_len, causal, return_lse):
    q, k, v = random_inputs(device, q_len, kv_len, batch=batch)
    num_rows, num_blocks = -(-q_len // 64), -(-kv_len // 64)
    lists = torch.zeros(batch, 2, num_rows, num_blocks, dtype=torch.int32, device=device)
    counts = torch.zeros(batch, 4, num_rows, dtype=torch.int32, device=device)
    out, lse = proxyattn.block_sparse_attention(
        q, k, v, lists, counts, 64, causal, return_lse=return_lse
    )
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == ((batch, 4, q_len) if return_lse else (0,))
    assert (lse == -INF).all()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("block_size", [64, 128])
def test_all_blocks_is_dense_attention(device, dtype, block_size, causal):
    """Against torch's own scaled_dot_product_attention, whose error the rule allows twice."""
    q_len, kv_len = 300, 300
    q, k, v = random_inputs(device, q_len, kv_len, dtype=dtype)
    num_blocks = -(-kv_len // block_size)
    lists = int32(torch.stack([torch.randperm(num_blocks)] * num_blocks).tolist(), device)
    lists = lists.expand(2, 1, num_blocks, num_blocks)
    counts = torch.full((2, 4, num_blocks), num_blocks, dtype=torch.int32, device=device)
    out, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, block_size, causal)
    arrays = [x.double().cpu().numpy() for x in (q, k, v)]
    want, want_lse = reference.dense_attention(*arrays, causal)
    if dtype == torch.float32:
        out_error, _ = fp32_attention_errors(*arrays, want_lse)
        assert_within(out, want, out_error)
        return
    by_torch = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    )
    assert_close(out, want, by_torch.transpose(1, 2))


def random_lists(device, batch, heads, num_rows, num_blocks):
    lists = torch.rand(batch, heads, num_rows, num_blocks).argsort(-1).int()
    counts = torch.randint(1, num_blocks + 1, (batch, heads, num_rows)).int()
    return lists.to(device), counts.to(device)


def test_order_of_a_list_does_not_matter_much(device):
    """Any order gives the same answer to within rounding."""
    q, k, v = random_inputs(device, 300, 640, dtype=torch.float16)
    lists, counts = random_lists(device, 2, 4, 5, 10)
    counts.fill_(6)
    first, first_lse = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64, return_lse=True)
    ordered = lists[..., :6].sort(-1).values.contiguous()
    second, second_lse = proxyattn.block_sparse_attention(
        q, k, v, ordered, counts, 64, return_lse=True
    )
    torch.testing.assert_close(first, second, atol=4e-3, rtol=0)
    torch.testing.assert_close(first_lse, second_lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_unchosen_blocks_do_not_leak(device, dtype, bad):
    """Whatever stands in keys and values of blocks that a head did not choose, bit for bit."""
    q, k, v = random_inputs(device, 200, 520, dtype=dtype, batch=1)
    lists = int32([2, 8, 5, 4, 0], device).expand(1, 4, 4, 5)
    counts = torch.full((1, 4, 4), 3, dtype=torch.int32, device=device)
    before = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64, return_lse=True)
    k[:, 256:320], v[:, 256:320] = bad, bad  # block 4, listed past the counts
    k[:, :128:7], v[:, :128:5] = bad, bad  # single keys of blocks 0 and 1
    after = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64, return_lse=True)
    assert before[0].isfinite().all()
    for first, second in zip(before, after, strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_other_heads_blocks_do_not_leak(device, bad):
    """A block that one head of a shared list reads and another does not."""
    q, k, v = random_inputs(device, 128, 512, batch=1)
    lists = int32([[[[0, 3, 5], [0, 4, 6]]]], device)
    counts = int32([[[2, 2], [3, 3], [2, 2], [3, 3]]], device)
    before, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64)
    k[:, 320:384], v[:, 384:448] = bad, bad
    after, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64)
    assert_same_bits(before[:, :, 0::2], after[:, :, 0::2])
    assert after[:, 64:, 1::2].isfinite().sum() == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("shorter, longer", [(0, 1), (1, 2), (1, 3), (2, 3), (3, 6), (4, 5)])
def test_nan_of_a_longer_list_stays_out_of_a_shorter(device, block_size, head_dim, shorter, longer):
    """Heads that share a list share its tiles too, but not what is behind their own counts."""
    blocks = [5, 0, 3, 1, 4, 2]
    tokens = 6 * block_size
    q, k, v = random_inputs(device, tokens, tokens, (5, 1), head_dim=head_dim, batch=1)
    lists = int32([[[blocks] * 6]], device)
    counts = int32([[[count] * 6 for count in (shorter, longer, longer, shorter, longer)]], device)
    arguments = lists, counts, block_size, False
    before, _ = proxyattn.block_sparse_attention(q, k, v, *arguments)
    for block in blocks[shorter:]:
        k[:, block * block_size :][:, :block_size] = NAN
        v[:, block * block_size :][:, :block_size] = NAN
    after, _ = proxyattn.block_sparse_attention(q, k, v, *arguments)
    assert_same_bits(before[:, :, [0, 3]], after[:, :, [0, 3]])
    assert after[:, :, [1, 2, 4]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_in_a_chosen_block_shows(device, dtype):
    q, k, v = random_inputs(device, 64, 256, dtype=dtype, batch=1)
    lists = int32([[[[0, 1]]]], device)
    counts = int32([[[2]] * 4], device)
    clean, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64)
    k_bad, v_bad = k.clone(), v.clone()
    k_bad[0, 70, 0, 5] = NAN
    v_bad[0, 10, 1, 7] = NAN
    out, lse = proxyattn.block_sparse_attention(q, k_bad, v_bad, lists, counts, 64, return_lse=True)
    assert out[:, :, :2].isnan().all() and lse[:, :2].isnan().all()  # a key's NaN, all elements
    assert out[:, :, 2:, 7].isnan().all() and lse[:, 2:].isfinite().all()  # a value's, its own
    assert_same_bits(out[:, :, 2:, 8:], clean[:, :, 2:, 8:])
    q[0, 3, 1, 0] = NAN  # a query's NaN stays in its row
    out, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64)
    assert out[0, 3, 1].isnan().all()
    out[0, 3, 1] = clean[0, 3, 1]
    assert_same_bits(out, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_logits_do_not_overflow(device, dtype):
    """Logits of +-10^4: the largest takes all, whichever block comes first."""
    q, k = zeros(64, dtype, device), zeros(192, dtype, device)
    q[..., 0] = 100
    k[0, :64, 0, 0], k[0, 64:128, 0, 0] = -100, 99
    k[0, 100, 0, 0] = 100
    v = token_values(list(range(192)), dtype, device)
    for blocks in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
        lists, counts = int32([[[blocks]]], device), int32([[[3]]], device)
        out, lse = proxyattn.block_sparse_attention(
            q, k, v, lists, counts, 64, causal=False, scale=1.0, return_lse=True
        )
        assert (out == 100).all()
        assert_within(lse, np.full(lse.shape, 10_000.0), 10_000 * 4 * FP32_UNIT)


def test_only_hopeless_keys(device):
    """All chosen logits at -10^4: they are weighed against each other, not against zero."""
    q, k = zeros(64, torch.float16, device), zeros(64, torch.float16, device)
    q[..., 0], k[..., 0] = 100, -100
    v = token_values([3.0] * 64, torch.float16, device)
    lists, counts = causal_lists(1, device)
    out, lse = proxyattn.block_sparse_attention(
        q, k, v, lists, counts, 64, scale=1.0, return_lse=True
    )
    assert (out == 3).all()
    assert_within(lse[0, 0], -10_000 + np.log(np.arange(1, 65)), 10_000 * 8 * FP32_UNIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_keys_at_minus_infinity_take_no_part(device, dtype):
    q, k = zeros(64, dtype, device), zeros(128, dtype, device)
    q[..., 0] = 1
    k[0, :96, 0, 0] = -INF
    v = token_values([7.0] * 96 + [2.0] * 32, dtype, device)
    for blocks in ([0, 1], [1, 0]):
        out, lse = proxyattn.block_sparse_attention(
            q,
            k,
            v,
            int32([[[blocks]]], device),
            int32([[[2]]], device),
            64,
            causal=False,
            return_lse=True,
        )
        assert_within(out, np.full(out.shape, 2.0), 1e-6)
        assert_within(lse, np.full(lse.shape, log(32)), 1e-6)


def test_rows_heads_and_batch_entries_are_independent(device):
    q, k, v = random_inputs(device, 256, 512)
    lists, counts = random_lists(device, 2, 4, 4, 8)
    whole, whole_lse = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64, return_lse=True)
    out, lse = proxyattn.block_sparse_attention(
        q[1:, 128:, 2:],
        k[1:, :, 1:],
        v[1:, :, 1:],
        lists[1:, 2:, 2:],
        counts[1:, 2:, 2:],
        64,
        return_lse=True,
    )
    torch.testing.assert_close(out, whole[1:, 128:, 2:], atol=1e-2, rtol=0)
    torch.testing.assert_close(lse, whole_lse[1:, 2:, 128:], atol=1e-5, rtol=0)
    out, lse = proxyattn.block_sparse_attention(
        q[1:], k[1:], v[1:], lists[1:], counts[1:], 64, return_lse=True
    )
    assert_same_bits(out, whole[1:])
    assert_same_bits(lse, whole_lse[1:])


def test_causal_future_does_not_matter(device):
    """Keys after a row change nothing in it; those of its own block are masked one by one."""
    q, k, v = random_inputs(device, 256, 256)
    lists, counts = causal_lists(4, device, heads=4)
    lists, counts = lists.expand(2, 1, 4, 4), counts.expand(2, 4, 4)
    before, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64)
    k[:, 100:], v[:, 100:] = 50, 50
    after, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64)
    assert_same_bits(before[:, :100], after[:, :100])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_same_bits_every_time(device, dtype, head_dim, set_threads):
    q, k, v = random_inputs(device, 700, 1100, (7, 1), dtype, head_dim)
    lists, counts = random_lists(device, 2, 7, 11, 18)
    first = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64, return_lse=True)
    for threads in (1, 2, 3):
        set_threads(threads)
        again = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64, return_lse=True)
        for got, want in zip(again, first, strict=True):
            assert_same_bits(got, want)


def test_heads_that_share_a_list_do_as_they_would_alone(device):
    """However many of them a kernel works on at a time, each stops at its own count."""
    q, k, v = random_inputs(device, 1500, 1500, (8, 2))
    lists, counts = random_lists(device, 2, 8, 24, 24)
    shared = lists[:, ::4].contiguous()
    alone = shared.repeat_interleave(4, dim=1)
    together, together_lse = proxyattn.block_sparse_attention(
        q, k, v, shared, counts, 64, return_lse=True
    )
    apart, apart_lse = proxyattn.block_sparse_attention(q, k, v, alone, counts, 64, return_lse=True)
    assert_same_bits(together, apart)
    assert_same_bits(together_lse, apart_lse)


def test_lse_is_no_part_of_the_output(device):
    q, k, v = random_inputs(device, 300, 640)
    lists, counts = random_lists(device, 2, 2, 5, 10)
    counts = counts.repeat_interleave(2, dim=1)
    with_lse, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64, return_lse=True)
    without, lse = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64)
    assert_same_bits(with_lse, without)
    assert lse.shape == (0,) and lse.dtype == torch.float32


def test_non_contiguous_lists(device):
    q, k, v = random_inputs(device, 300, 640)
    lists, counts = random_lists(device, 2, 4, 5, 10)
    want, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64)
    lists = lists.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    counts = counts.transpose(0, 2).contiguous().transpose(0, 2)
    got, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64)
    assert_same_bits(got, want)


def test_expanded_keys(device, monkeypatch):
    """A batch that shares its keys and values, stride zero."""
    q, k, v = random_inputs(device, 130, 300)
    lists, counts = random_lists(device, 2, 4, 3, 5)
    k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    got, _ = proxyattn.block_sparse_attention(q, k, v, lists, counts, 64)
    # The copy engine takes no such stride, so these were the kernels for every device.
    monkeypatch.setenv("PROXYATTN_FAMILY", "sm80")
    want, _ = proxyattn.block_sparse_attention(q, k.clone(), v.clone(), lists, counts, 64)
    assert_same_bits(got, want)


@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)], ids=["tokens", "batch"])
def test_70000_rows(device, shape):
    rng = np.random.default_rng(7)
    q = normal(rng, (*shape, 1, 64), torch.bfloat16)
    tensor = lay_out(q, torch.bfloat16, device)
    num_rows = -(-shape[1] // 128)
    own = np.arange(num_rows).reshape(1, 1, num_rows, 1)
    indices = np.concatenate([own, own // 2], axis=3).repeat(shape[0], axis=0)
    counts = np.minimum(own[..., 0] + 1, 2).repeat(shape[0], axis=0)
    lists = [torch.from_numpy(x).to(device, torch.int32) for x in (indices, counts)]
    out, lse = proxyattn.block_sparse_attention(
        tensor, tensor, tensor, *lists, 128, return_lse=True
    )
    if shape[0] > 1:  # one token that sees itself
        assert torch.equal(out, tensor)
        return
    rows = [0, 300, num_rows - 1]
    tokens = np.concatenate([np.arange(shape[1])[m * 128 : (m + 1) * 128] for m in rows])
    want, want_lse = reference.block_sparse_attention(
        q, q, q, indices, counts, 128, True, rows=rows
    )
    want, want_lse = want[:, tokens], want_lse[..., tokens]
    # Weights and outputs are rounded to bfloat16 once, each by at most 2^-8 of itself.
    assert_within(out[:, tokens], want, 2**-7 * np.abs(q).max())
    _, lse_error = fp32_attention_errors(q[:, tokens], q, q, want_lse)
    assert_within(lse[..., tokens], want_lse, lse_error)
