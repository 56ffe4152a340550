"""Packed and paged sequences: what the dense ops give for each sequence on its own."""

from dataclasses import dataclass

import numpy as np
import plain
import proxyattn
import pytest
import torch
from inputs import DTYPES, HEAD_DIMS, balanced, name_of
from packs import CACHES, PAGES, random_lengths, random_lists, random_pack
from reference import attention as reference
from tolerance import (
    assert_close,
    assert_same_bits,
    assert_within,
    fp32_attention_errors,
    to_numpy,
)

MODES = ("top_p", "last_block")


@dataclass(frozen=True)
class Case:
    seed: int
    heads: tuple  # (q_heads, kv_heads, proxy_heads)
    head_dim: int
    block_size: int
    page: int | None
    cache: str
    causal: bool
    mode: str
    stride: int
    gamma: float
    min_budget: int
    dtype: torch.dtype

    def __str__(self):
        where = "packed" if self.page is None else f"pages{self.page}-{self.cache}"
        return (
            f"{self.seed}-h{'x'.join(map(str, self.heads))}-d{self.head_dim}-k{self.block_size}-"
            f"{where}-{'causal' if self.causal else 'full'}-{self.mode}-s{self.stride}-"
            f"gamma{self.gamma}-min{self.min_budget}-{name_of(self.dtype)}"
        )

    def pack(self, device):
        lengths = random_lengths(np.random.default_rng(self.seed), self.causal)
        heads, shape = self.heads[:2], (self.head_dim, self.dtype)
        return random_pack(device, lengths, heads, *shape, self.page, self.cache, seed=self.seed)

    @property
    def settings(self):
        return {
            "causal": self.causal,
            "gamma": self.gamma,
            "stride": self.stride,
            "pooling": ("mean", "first")[self.seed % 2],
            "block_size": self.block_size,
            "num_proxy_heads": self.heads[2],
            "budget_mode": self.mode,
            "min_budget": self.min_budget,
        }


def cases(count, seed):
    axes = {
        "seed": range(seed, seed + count),
        "heads": ((4, 2, 2), (4, 1, 4), (8, 2, 1), (6, 2, 2), (3, 3, 3)),
        "head_dim": HEAD_DIMS,
        "block_size": (64, 128),
        "page": (None, None, *PAGES),
        "cache": CACHES,
        "causal": (True, True, True, False),
        "mode": MODES,
        "stride": (1, 2, 4, 8),
        "gamma": (0.4, 0.7, 0.9),
        "min_budget": (0, 0, 100),
        "dtype": DTYPES,
    }
    return [Case(**values) for values in balanced(axes, count, seed)]


def is_dense_call(lengths, causal):
    """Whether a dense op takes it: those want every causal query to see a key."""
    q_len, kv_len = lengths
    return not causal or q_len <= kv_len


def assert_attends_to(out, lse, tensors, indices, counts, block_size, causal):
    """One sequence's [1, ...] is right for these lists, by the reference."""
    q, k, v = (to_numpy(x) for x in tensors)
    lists = indices.cpu().numpy(), counts.cpu().numpy()
    want, want_lse = reference.block_sparse_attention(q, k, v, *lists, block_size, causal)
    if k.size == 0:
        assert (out == 0).all() and (lse == -torch.inf).all()
        return
    out_error, lse_error = fp32_attention_errors(q, k, v, want_lse)
    assert_within(lse, want_lse, lse_error, "lse")
    if out.dtype == torch.float32:
        assert_within(out, want, out_error, "out")
        return
    seen = plain.seen_keys(indices, counts, q.shape[1], k.shape[1], block_size, causal)
    assert_close(out, want, plain.attention(*tensors, seen), "out")


def lists_of(pack, i, indices, counts, block_size):
    """Sequence i's lists as the dense op takes them."""
    rows = pack.rows(i, block_size)
    return indices[None, :, rows], counts[None, :, rows]


def check_attention(case, device):
    pack = case.pack(device)
    rng = np.random.default_rng(case.seed)
    q_heads = case.heads[0]
    list_heads = int(rng.choice([n for n in range(1, q_heads + 1) if q_heads % n == 0]))
    indices, counts = random_lists(rng, pack, list_heads, q_heads, case.block_size)
    settings = {"block_size": case.block_size, "causal": case.causal, "return_lse": True}
    out = torch.full_like(pack.tensors["q"], 7)
    given = out if case.seed % 2 else None
    result, lse = proxyattn.block_sparse_attention_varlen(
        **pack.arguments, indices=indices, counts=counts, out=given, **settings
    )
    assert result.shape == out.shape and result.dtype == case.dtype
    assert lse.shape == (q_heads, len(out)) and lse.dtype == torch.float32
    if given is not None:
        assert result is given and (result[pack.rest()] == 7).all()
    for i, lengths in enumerate(pack.lengths):
        got = result[None, pack.tokens(i)], lse[None, :, pack.tokens(i)]
        lists = lists_of(pack, i, indices, counts, case.block_size)
        if is_dense_call(lengths, case.causal):
            want = proxyattn.block_sparse_attention(*pack.sequences[i], *lists, **settings)
            for first, second in zip(got, want, strict=True):
                assert_same_bits(first, second, f"sequence {i} of {lengths}")
        else:
            sequence = pack.sequences[i]
            assert_attends_to(*got, sequence, *lists, case.block_size, case.causal)


@pytest.mark.parametrize("case", cases(60, seed=100), ids=str)
def test_attention_equals_the_sequences_one_by_one(device, case):
    """For given lists, bit for bit."""
    check_attention(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(400, seed=1000), ids=str)
def test_attention_equals_the_sequences_one_by_one_sweep(device, case):
    check_attention(case, device)


def assert_counts_nearly_equal(counts, want, indices, sequence, shares, settings):
    """Counts [1, Hq, Mb] may differ by a block where a mass is within 1e-5 of what is needed."""
    if torch.equal(counts, want):
        return
    q, k, _ = sequence
    assert settings["budget_mode"] == "top_p" and q.is_cuda
    names = ("num_proxy_heads", "stride", "pooling")
    proxies = proxyattn.pool_heads(q, k, **{name: settings[name] for name in names})
    lengths = (q.shape[1], k.shape[1], settings["stride"], settings["block_size"])
    _, mass = proxyattn.score_blocks(*proxies, *lengths, settings["causal"], with_mass=True)
    for _, h, m in (counts != want).nonzero().tolist():
        ranking = indices[0, h * len(indices[0]) // counts.shape[1], m]
        row = mass[0, h * len(indices[0]) // counts.shape[1], m][ranking[ranking >= 0].long()]
        fewer, more = sorted((int(counts[0, h, m]), int(want[0, h, m])))
        assert more == fewer + 1, f"head {h}, row {m}: {fewer} and {more} blocks"
        forced = int(settings["num_forced"](m))
        free = row[forced:].double()
        need = (settings["gamma"] - shares[0, h]) / (1 - shares[0, h])
        held = free[: fewer - forced].sum() / free.sum()
        assert abs(float(held - need)) <= 1e-5, f"head {h}, row {m}: holds {held} of {need}"


def forced_blocks(q_len, kv_len, block_size, causal):
    """Of each query block: the sink block and the local ones."""

    def count(m):
        if not causal:
            return min(1, kv_len)
        first = kv_len - q_len + m * block_size
        last = kv_len - q_len + min((m + 1) * block_size, q_len) - 1
        own = set(range(max(first, 0) // block_size, last // block_size + 1)) if last >= 0 else ()
        return len({0, *own}) if last >= 0 else 0

    return count


def check_choice(case, device):
    pack = case.pack(device)
    indices, counts = proxyattn.choose_blocks_varlen(**pack.estimate_arguments, **case.settings)
    num_rows, block_size = pack.num_rows(case.block_size), case.block_size
    num_blocks = -(-pack.places["max_seqlen_k"] // block_size)
    assert indices.shape == (case.heads[2], num_rows, num_blocks)
    assert counts.shape == (case.heads[0], num_rows)
    used = sum(-(-q_len // block_size) for q_len, _ in pack.lengths)
    assert (counts[:, used:] == 0).all()
    for i, lengths in enumerate(pack.lengths):
        got, got_counts = lists_of(pack, i, indices, counts, block_size)
        own_blocks = -(-lengths[1] // block_size)
        assert (got[..., own_blocks:] == -1).all()
        if not is_dense_call(lengths, case.causal):
            continue  # test_more_queries_than_keys
        want, want_counts = proxyattn.choose_blocks(*pack.sequences[i][:2], **case.settings)
        assert torch.equal(got[..., :own_blocks], want), f"sequence {i} of {lengths}"
        forced = forced_blocks(*lengths, block_size, case.causal)
        shares = proxyattn.estimate_shares(*pack.sequences[i][:2], block_size, case.causal)
        settings = {**case.settings, "num_forced": forced}
        assert_counts_nearly_equal(
            got_counts, want_counts, want, pack.sequences[i], shares, settings
        )


@pytest.mark.parametrize("case", cases(60, seed=200), ids=str)
def test_lists_equal_those_of_the_sequences_one_by_one(device, case):
    check_choice(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(400, seed=2000), ids=str)
def test_lists_equal_those_of_the_sequences_one_by_one_sweep(device, case):
    check_choice(case, device)


def check_chain(case, device):
    pack = case.pack(device)
    out = torch.full_like(pack.tensors["q"], 7)
    result, lse = proxyattn.proxy_attention_varlen(
        **pack.arguments, **case.settings, return_lse=True, out=out
    )
    assert result is out and (out[pack.rest()] == 7).all()
    indices, counts = proxyattn.choose_blocks_varlen(**pack.estimate_arguments, **case.settings)
    for i, lengths in enumerate(pack.lengths):
        got = out[None, pack.tokens(i)], lse[None, :, pack.tokens(i)]
        if device == "cpu" and is_dense_call(lengths, case.causal):
            want = proxyattn.proxy_attention(*pack.sequences[i], **case.settings, return_lse=True)
            for first, second in zip(got, want, strict=True):
                assert_same_bits(first, second, f"sequence {i} of {lengths}")
        else:
            lists = lists_of(pack, i, indices, counts, case.block_size)
            sequence = pack.sequences[i]
            assert_attends_to(*got, sequence, *lists, case.block_size, case.causal)


@pytest.mark.parametrize("case", cases(60, seed=300), ids=str)
def test_equals_the_sequences_one_by_one(device, case):
    """On the CPU bit for bit, on a GPU it attends to the lists that choose_blocks_varlen gives."""
    check_chain(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(400, seed=3000), ids=str)
def test_equals_the_sequences_one_by_one_sweep(device, case):
    check_chain(case, device)
