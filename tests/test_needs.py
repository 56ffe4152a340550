"""estimate_budgets: how many key blocks hold a share gamma of a head's attention."""

from dataclasses import dataclass
from itertools import pairwise
from math import log

import numpy as np
import proxyattn
import pytest
import torch
from inputs import (
    DTYPES,
    HALF_DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    LENGTHS,
    balanced,
    lay_out,
    name_of,
    normal,
)
from reference import budget as reference

#: A budget may be off by one block where the cumulative share is this close to gamma.
SHARE_MARGIN = 1e-5


def keys_with_block_weights(weights, block_size, dtype, device):
    """Keys whose first element is the log of their block's weight: a query of one, at scale 1,
    puts a share on each block that is proportional to its weight."""
    k = torch.zeros(1, len(weights) * block_size, 1, 64, dtype=dtype, device=device)
    k[0, :, 0, 0] = torch.tensor(weights, dtype=torch.float64).log().repeat_interleave(block_size)
    return k


def ones_query(q_len, dtype, device, heads=1):
    q = torch.zeros(1, q_len, heads, 64, dtype=dtype, device=device)
    q[..., 0] = 1
    return q


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_literal_shares(device, block_size, dtype):
    """Shares 10/20, 5/20, 3/20, 2/20 and 2^-20/20: the largest 1, 2, 3, 4 blocks hold .5, .75, .9
    and almost 1."""
    k = keys_with_block_weights([3, 10, 2, 2.0**-20, 5], block_size, dtype, device)
    q = ones_query(3, dtype, device)
    inf = float("inf")
    blocks_of = {-inf: 1, -1: 1, 0: 1, 0.3: 1, 0.45: 1, 0.55: 2, 0.7: 2, 0.8: 3, 0.89: 3}
    blocks_of |= {0.97: 4, 0.999: 4, 1.0: 5, 2.5: 5, inf: 5}
    for gamma, blocks in blocks_of.items():
        budgets = proxyattn.estimate_budgets(q, k, gamma, block_size, causal=False, scale=1.0)
        assert budgets.dtype == torch.int32
        assert budgets.tolist() == [[blocks]], gamma


def test_literal_equal_keys(device):
    """Ten blocks of one tenth: gamma .25 needs three, .95 all ten."""
    q = k = torch.zeros(1, 640, 2, 64, dtype=torch.bfloat16, device=device)
    for gamma, blocks in [(0.05, 1), (0.25, 3), (0.55, 6), (0.85, 9), (0.95, 10)]:
        budgets = proxyattn.estimate_budgets(q, k, gamma, 64, causal=False)
        assert budgets.tolist() == [[blocks, blocks]]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_literal_exact_tie(device, dtype):
    """Equal blocks: sums and halves of one number are exact, so that half of them hold gamma .5 to
    the last bit. What is reached need not be passed."""
    for num_blocks in (2, 4, 8):
        q = k = torch.zeros(1, num_blocks * 64, 1, 64, dtype=dtype, device=device)
        budgets = proxyattn.estimate_budgets(q, k, 0.5, 64, causal=False)
        assert budgets.tolist() == [[num_blocks // 2]]


def test_literal_causal(device):
    """64 queries at positions 64 to 127, all keys equal. Query i puts 64 / (i + 1) on block 0: on
    average 64 * (1/65 + ... + 1/128) / 64 = H(128) - H(64) = 0.68925."""
    q = k = torch.zeros(1, 128, 1, 64, dtype=torch.float16, device=device)
    assert proxyattn.estimate_budgets(q, k, 0.689, 64).tolist() == [[1]]
    assert proxyattn.estimate_budgets(q, k, 0.690, 64).tolist() == [[2]]


def test_literal_last_queries_only(device):
    """The last b queries count, even where they straddle two query blocks, and no other."""
    dtype = torch.bfloat16
    k = keys_with_block_weights([1, 1, 1000], 64, dtype, device)
    q = ones_query(100, dtype, device)
    q[:, :36] = 0  # the first 36 queries spread their attention; they are not looked at
    assert proxyattn.estimate_budgets(q, k, 0.9, 64, causal=False, scale=1.0).tolist() == [[1]]
    q[:, 36:68] = 0  # now half of the last 64 do
    # Block 2 has (1/3 + .998) / 2 = .666, every other (1/3 + .001) / 2 = .167.
    assert proxyattn.estimate_budgets(q, k, 0.6, 64, causal=False, scale=1.0).tolist() == [[1]]
    assert proxyattn.estimate_budgets(q, k, 0.8, 64, causal=False, scale=1.0).tolist() == [[2]]
    assert proxyattn.estimate_budgets(q, k, 0.9, 64, causal=False, scale=1.0).tolist() == [[3]]


def test_literal_grouped_heads(device):
    """Query heads 0 and 1 read key head 0, heads 2 and 3 key head 1."""
    dtype = torch.float16
    k = torch.cat(
        [
            keys_with_block_weights(weights, 64, dtype, device)
            for weights in ([100, 1, 1, 1], [1, 1, 1, 1])
        ],
        dim=2,
    )
    q = ones_query(1, dtype, device, heads=4)
    q[0, 0, 1] = 0
    budgets = proxyattn.estimate_budgets(q, k, 0.9, 64, causal=False, scale=1.0)
    assert budgets.tolist() == [[1, 4, 4, 4]]


def test_literal_default_scale(device):
    """1 / sqrt(64): a key of 8 log 99 has 99 times the weight."""
    k = torch.zeros(1, 128, 1, 64, dtype=torch.float16, device=device)
    k[0, :64, 0, 0] = 8 * log(99)
    q = ones_query(1, torch.float16, device)
    assert proxyattn.estimate_budgets(q, k, 0.98, 64, causal=False).tolist() == [[1]]
    assert proxyattn.estimate_budgets(q, k, 0.995, 64, causal=False).tolist() == [[2]]


def test_ragged_last_key_block(device):
    """65 keys: the second block holds one, 1/65 of the attention."""
    q = k = torch.zeros(1, 65, 1, 64, dtype=torch.float16, device=device)
    assert proxyattn.estimate_budgets(q, k, 0.98, 64, causal=False).tolist() == [[1]]
    assert proxyattn.estimate_budgets(q, k, 0.99, 64, causal=False).tolist() == [[2]]


@dataclass(frozen=True)
class Case:
    batch: int
    lengths: tuple
    heads: tuple
    head_dim: int
    block_size: int
    gamma: float
    scale: float | None
    spread: float
    dtype: torch.dtype
    layouts: tuple

    def __str__(self):
        q_len, kv_len, causal = self.lengths
        return (
            f"b{self.batch}-m{q_len}-n{kv_len}-{'causal' if causal else 'full'}-"
            f"h{'x'.join(map(str, self.heads))}-d{self.head_dim}-k{self.block_size}-"
            f"gamma{self.gamma:g}-scale{self.scale}-x{self.spread:g}-{name_of(self.dtype)}-"
            f"{'-'.join(self.layouts)}"
        )


LONG = ((130, 1000, True), (1100, 1100, True), (77, 1500, False), (1, 900, True))


def cases(count, seed):
    axes = {
        "batch": (1, 3),
        "lengths": LENGTHS + LONG,
        "heads": ((1, 1), (4, 4), (4, 1), (8, 2), (7, 1), (14, 2), (8, 1)),
        "head_dim": HEAD_DIMS,
        "block_size": (64, 128),
        "gamma": (0.1, 0.5, 0.8, 0.9, 0.95, 0.99, 0.9999),
        "scale": (None, 0.25),
        "spread": (0.5, 1.0, 2.0),
        "dtype": DTYPES,
        "layouts": tuple(zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)),
    }
    return [Case(**values) for values in balanced(axes, count, seed)]


def check(case, device):
    q_len, kv_len, causal = case.lengths
    rng = np.random.default_rng([q_len, kv_len, case.head_dim, *case.heads])
    q, k = (
        normal(rng, (case.batch, n, heads, case.head_dim), case.dtype, case.spread)
        for n, heads in zip((q_len, kv_len), case.heads, strict=True)
    )
    tensors = [
        lay_out(x, case.dtype, device, layout)
        for x, layout in zip((q, k), case.layouts, strict=True)
    ]
    settings = (case.block_size, causal, case.scale)
    budgets = proxyattn.estimate_budgets(*tensors, case.gamma, *settings)
    a = reference.block_mass(q, k, *settings)
    expected = reference.budgets_of(a, case.gamma)
    assert_budgets(budgets, expected, reference.shares(a), case.gamma)


def assert_budgets(budgets, expected, shares, gamma):
    """Equal, and by the property alone where a share lies at gamma within the margin."""
    budgets = budgets.cpu().numpy()
    assert budgets.shape == expected.shape
    for head in np.ndindex(budgets.shape):
        k = budgets[head]
        assert 1 <= k <= shares.shape[-1] - 1
        # It reaches gamma, and one block less does not.
        assert k == shares.shape[-1] - 1 or shares[head][k] >= gamma - SHARE_MARGIN
        assert k == 1 or shares[head][k - 1] < gamma + SHARE_MARGIN
        if np.abs(shares[head] - gamma).min() > SHARE_MARGIN:
            assert k == expected[head], f"head {head}: {k} blocks, reference {expected[head]}"


@pytest.mark.parametrize("case", cases(200, seed=1), ids=str)
def test_reference(device, case):
    check(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(1000, seed=2), ids=str)
def test_reference_sweep(device, case):
    check(case, device)


def test_the_margin_is_rarely_needed():
    """The reference cases test exact budgets, but for the odd head."""
    heads = close = 0
    for case in cases(40, seed=1):
        q_len, kv_len, causal = case.lengths
        rng = np.random.default_rng([q_len, kv_len, case.head_dim, *case.heads])
        q, k = (
            normal(rng, (1, n, h, case.head_dim), case.dtype, case.spread)
            for n, h in zip((q_len, kv_len), case.heads, strict=True)
        )
        a = reference.block_mass(q, k, case.block_size, causal, case.scale)
        distance = np.abs(reference.shares(a) - case.gamma).min(axis=-1)
        heads += distance.size
        close += np.count_nonzero(distance <= SHARE_MARGIN)
    assert close <= 0.02 * heads


def random_inputs(device, q_len, kv_len, dtype=torch.bfloat16, heads=(4, 2)):
    return [
        torch.randn(2, n, h, 64).mul(2).to(dtype).to(device)
        for n, h in zip((q_len, kv_len), heads, strict=True)
    ]


def test_more_gamma_more_blocks(device):
    q, k = random_inputs(device, 300, 1300)
    gammas = (-0.5, 0.0, 0.2, 0.5, 0.7, 0.9, 0.99, 1.0, 1.5)
    budgets = [proxyattn.estimate_budgets(q, k, gamma, 64) for gamma in gammas]
    for smaller, larger in pairwise(budgets):
        assert (smaller <= larger).all()
    assert (budgets[0] == 1).all() and (budgets[1] == 1).all()
    assert (budgets[-2] == 21).all() and (budgets[-1] == 21).all()


def test_earlier_queries_and_future_keys_do_not_matter(device):
    q, k = random_inputs(device, 200, 700)
    before = proxyattn.estimate_budgets(q, k, 0.9, 128)
    q[:, :72] = torch.nan
    assert torch.equal(proxyattn.estimate_budgets(q, k, 0.9, 128), before)
    # The queries' share of the sequence alone.
    assert torch.equal(proxyattn.estimate_budgets(q[:, 72:], k, 0.9, 128), before)


def test_heads_and_batch_entries_are_independent(device):
    q, k = random_inputs(device, 200, 900, heads=(6, 2))
    whole = proxyattn.estimate_budgets(q, k, 0.9, 64)
    part = proxyattn.estimate_budgets(q[1:, :, 3:], k[1:, :, 1:], 0.9, 64)
    assert torch.equal(part, whole[1:, 3:])


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_same_budgets_every_time(device, dtype, set_threads):
    q, k = random_inputs(device, 777, 2001, dtype)
    first = proxyattn.estimate_budgets(q, k, 0.9, 64)
    for threads in (1, 2, 3):
        set_threads(threads)
        assert torch.equal(proxyattn.estimate_budgets(q, k, 0.9, 64), first)


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 0.5, 1.0])
def test_empty(device, gamma):
    q, k = random_inputs(device, 100, 200)
    assert proxyattn.estimate_budgets(q[:0], k[:0], gamma).shape == (0, 4)
    for empty in [(q[:, :0], k), (q[:, :0], k[:, :0])]:
        assert proxyattn.estimate_budgets(*empty, gamma).tolist() == [[0] * 4] * 2
    budgets = proxyattn.estimate_budgets(q, k[:, :0], gamma, causal=False)
    assert budgets.tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("poisoned", ["q", "k"])
def test_nan_takes_all_blocks(device, dtype, poisoned):
    q, k = random_inputs(device, 130, 500, dtype)
    clean = proxyattn.estimate_budgets(q, k, 0.3, 64)
    expected = clean.clone()
    if poisoned == "q":
        q[1, 129, 2, 63] = torch.nan
        expected[1, 2] = 8
    else:
        k[1, 3, 1, 0] = torch.nan
        expected[1, 2:] = 8
    assert (clean < 8).all()
    assert torch.equal(proxyattn.estimate_budgets(q, k, 0.3, 64), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_logits(device, dtype):
    """+-10^4: one block holds everything."""
    k = torch.zeros(1, 640, 1, 64, dtype=dtype, device=device)
    k[0, :, 0, 0] = -100
    k[0, 200, 0, 0] = 100
    q = 100 * ones_query(64, dtype, device)
    assert proxyattn.estimate_budgets(q, k, 0.999, 64, causal=False, scale=1.0).tolist() == [[1]]


def test_keys_at_minus_infinity_hold_nothing(device):
    k = torch.zeros(1, 256, 1, 64, dtype=torch.bfloat16, device=device)
    k[0, :128, 0, 0] = -torch.inf
    q = ones_query(64, torch.bfloat16, device)
    for gamma, blocks in [(0.4, 1), (0.6, 2), (0.9999, 2), (1.0, 4)]:
        budgets = proxyattn.estimate_budgets(q, k, gamma, 64, causal=False, scale=1.0)
        assert budgets.tolist() == [[blocks]]


@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)], ids=["tokens", "batch"])
def test_70000_rows(device, shape):
    rng = np.random.default_rng(5)
    k = normal(rng, (*shape, 1, 64), torch.bfloat16)
    q = 4 * k[:, -64:]
    tensors = [lay_out(x, torch.bfloat16, device) for x in (q, k)]
    budgets = proxyattn.estimate_budgets(*tensors, 0.9, 64)
    if shape[0] > 1:
        assert (budgets == 1).all()
    else:
        a = reference.block_mass(q, k, 64, True)
        assert_budgets(budgets, reference.budgets_of(a, 0.9), reference.shares(a), 0.9)
