"""estimate_budgets: how many key blocks hold a share gamma of a head's attention; estimate_shares:
how much of it the forced blocks hold."""

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
from reference import needs as reference
from tolerance import assert_same_bits, assert_within, log_sum_error, logit_error, to_numpy

#: A budget may be off by one block where the part reached is this close to gamma.
REACHED_MARGIN = 1e-5


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
def test_literal_budgets(device, block_size, dtype):
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


def test_literal_ties_reach(device):
    """A part that is gamma exactly will do: with equal keys, two blocks hold a half and a half,
    four a quarter each, all of it exact in binary."""
    for num_blocks, blocks_of in [(2, {0.5: 1}), (4, {0.25: 1, 0.5: 2, 0.75: 3})]:
        q = k = torch.zeros(1, 64 * num_blocks, 1, 64, dtype=torch.float16, device=device)
        for gamma, blocks in blocks_of.items():
            budgets = proxyattn.estimate_budgets(q, k, gamma, 64, causal=False)
            assert budgets.tolist() == [[blocks]], gamma


def shares_of_one_head(q, k, *forcing, **settings):
    shares = proxyattn.estimate_shares(q, k, 64, settings.pop("causal", True), None, *forcing)
    assert shares.dtype == torch.float32 and shares.shape == (1, 1)
    return shares.item()


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_literal_shares_of_sinks(device, block_size, dtype):
    """Weights 1, 8, 2, 4 and 1 of 16: at scale log 2, keys hold their exponents. Without causal no
    block is local."""
    k = torch.zeros(1, 5 * block_size, 1, 64, dtype=dtype, device=device)
    k[0, :, 0, 0] = torch.tensor([0.0, 3, 1, 2, 0]).repeat_interleave(block_size)
    q = ones_query(3, dtype, device)
    for sinks, share in enumerate([0, 1 / 16, 9 / 16, 11 / 16, 15 / 16, 1, 1]):
        for local in (0, 1, 3):
            shares = proxyattn.estimate_shares(q, k, block_size, False, log(2), sinks, local)
            assert shares.dtype == torch.float32
            assert_within(shares, np.array([[share]]), 1e-5)


def test_literal_shares_of_a_ragged_call(device):
    """All keys equal: 278 of them, four blocks and 22, and 150 queries, of which the last 64 stand
    at 214 to 277, in blocks 3 and 4; those of the last query block, 22, would in block 4 alone.
    Query i puts 1 / (i + 1) on each key that it sees."""
    q, k = (torch.zeros(1, n, 1, 64, dtype=torch.bfloat16, device=device) for n in (150, 278))
    early = sum(1 / (i + 1) for i in range(214, 278))  # a whole block that all see: .2610
    last = sum((i - 255) / (i + 1) for i in range(256, 278)) / 64
    for (sinks, local), share in {
        (0, 0): 0,
        (1, 0): early,
        (4, 0): 1 - last,
        (0, 1): 1 - 3 * early,
        (1, 1): 1 - 2 * early,
        (4, 1): 1,
        (0, 3): 1 - early,
        (1, 3): 1,
        (4, 3): 1,
    }.items():
        got = shares_of_one_head(q, k, sinks, local)
        assert abs(got - share) <= 1e-5, (sinks, local)
    assert shares_of_one_head(q, k) == shares_of_one_head(q, k, 1, 1)  # the defaults


def test_literal_shares_of_few_queries(device):
    """Ten queries at 268 to 277 of 278: all in block 4, which alone is local then."""
    q, k = (torch.zeros(1, n, 1, 64, dtype=torch.bfloat16, device=device) for n in (10, 278))
    last = sum((i - 255) / (i + 1) for i in range(268, 278)) / 10
    block = sum(64 / (i + 1) for i in range(268, 278)) / 10
    for (sinks, local), share in {
        (0, 1): last,
        (1, 1): last + block,
        (0, 3): last + 2 * block,
        (4, 3): 1,
    }.items():
        assert abs(shares_of_one_head(q, k, sinks, local) - share) <= 1e-5, (sinks, local)


def test_literal_shares_without_causal(device):
    """Every key holds 1/278; no block is local, whatever is asked for."""
    q, k = (torch.zeros(1, n, 1, 64, dtype=torch.bfloat16, device=device) for n in (100, 278))
    for sinks, share in [(0, 0), (1, 64 / 278), (4, 256 / 278), (9, 1)]:
        for local in (0, 1, 3):
            got = shares_of_one_head(q, k, sinks, local, causal=False)
            assert abs(got - share) <= 1e-5, (sinks, local)


def test_literal_shares_of_grouped_heads(device):
    """Query heads 0 and 1 read key head 0, whose block 0 holds 3/4, heads 2 and 3 key head 1, whose
    block 0 holds 1/4; head 1 looks at nothing in particular."""
    k = torch.zeros(1, 128, 2, 64, dtype=torch.float16, device=device)
    k[0, :64, 0, 0] = 1.0
    k[0, 64:, 1, 0] = 1.0
    q = ones_query(1, torch.float16, device, heads=4)
    q[0, 0, 1] = 0
    shares = proxyattn.estimate_shares(q, k, 64, causal=False, scale=log(3))
    assert_within(shares, np.array([[0.75, 0.5, 0.25, 0.25]]), 1e-5)


@dataclass(frozen=True)
class Case:
    batch: int
    lengths: tuple
    heads: tuple
    head_dim: int
    block_size: int
    gamma: float
    forcing: tuple  # sink and local blocks
    scale: float | None
    spread: float
    dtype: torch.dtype
    layouts: tuple

    def __str__(self):
        q_len, kv_len, causal = self.lengths
        return (
            f"b{self.batch}-m{q_len}-n{kv_len}-{'causal' if causal else 'full'}-"
            f"h{'x'.join(map(str, self.heads))}-d{self.head_dim}-k{self.block_size}-"
            f"gamma{self.gamma:g}-"
            f"sink{self.forcing[0]}-local{self.forcing[1]}-scale{self.scale}-x{self.spread:g}-{name_of(self.dtype)}-"
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
        "forcing": ((1, 1), (0, 1), (1, 0), (4, 0), (0, 3), (2, 2)),
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
    assert_budgets(budgets, expected, reference.reached(a), case.gamma)
    shares = proxyattn.estimate_shares(*tensors, *settings, *case.forcing)
    forced = reference.last_forced(q_len, kv_len, case.block_size, causal, *case.forcing)
    assert_shares(shares, a, forced, q, k, case.scale)


def assert_budgets(budgets, expected, reached, gamma):
    """Equal, and by the property alone where a part lies at gamma within the margin."""
    budgets = budgets.cpu().numpy()
    assert budgets.shape == expected.shape
    for head in np.ndindex(budgets.shape):
        k = budgets[head]
        assert 1 <= k <= reached.shape[-1] - 1
        # It reaches gamma, and one block less does not.
        assert k == reached.shape[-1] - 1 or reached[head][k] >= gamma - REACHED_MARGIN
        assert k == 1 or reached[head][k - 1] < gamma + REACHED_MARGIN
        if np.abs(reached[head] - gamma).min() > REACHED_MARGIN:
            assert k == expected[head], f"head {head}: {k} blocks, reference {expected[head]}"


def assert_shares(shares, a, forced, q, k, scale=None):
    """a is the mass of q and k by block, in float64."""
    assert shares.dtype == torch.float32 and shares.is_contiguous()
    error = log_sum_error(np.log(a[a > 0]), logit_error(q, k, scale), k.shape[1])
    assert_within(shares, reference.shares_of(a, forced), 2 * np.expm1(error), "shares")
    assert ((shares >= 0) & (shares <= 1)).all()


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
        distance = np.abs(reference.reached(a) - case.gamma).min(axis=-1)
        heads += distance.size
        close += np.count_nonzero(distance <= REACHED_MARGIN)
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


def test_more_forced_blocks_larger_shares(device):
    q, k = random_inputs(device, 100, 700)
    shares = [
        proxyattn.estimate_shares(q, k, num_sink_blocks=sinks, num_local_blocks=local)
        for sinks, local in [
            (0, 0),
            (1, 0),
            (1, 1),
            (2, 1),
            (2, 4),
            (99, 4),
            (2**63 - 1, 2**63 - 1),
        ]
    ]
    for smaller, larger in pairwise(shares[:-1]):
        assert (smaller < larger).all()
    assert (shares[0] == 0).all()
    assert_within(shares[-2], np.ones((2, 4)), 1e-6)
    assert_within(shares[-1], np.ones((2, 4)), 1e-6)


def test_earlier_queries_do_not_matter(device):
    q, k = random_inputs(device, 200, 700)
    budgets = proxyattn.estimate_budgets(q, k, 0.9, 128)
    shares = proxyattn.estimate_shares(q, k, 128)
    q[:, :72] = torch.nan
    for late in (q, q[:, 72:]):
        assert torch.equal(proxyattn.estimate_budgets(late, k, 0.9, 128), budgets)
        assert_same_bits(proxyattn.estimate_shares(late, k, 128), shares)


def test_heads_and_batch_entries_are_independent(device):
    q, k = random_inputs(device, 200, 900, heads=(6, 2))
    part = (q[1:, :, 3:], k[1:, :, 1:])
    budgets = proxyattn.estimate_budgets(q, k, 0.9, 64)
    assert torch.equal(proxyattn.estimate_budgets(*part, 0.9, 64), budgets[1:, 3:])
    shares = proxyattn.estimate_shares(q, k)
    assert_within(proxyattn.estimate_shares(*part), to_numpy(shares[1:, 3:]), 1e-5)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_same_needs_every_time(device, dtype, set_threads):
    q, k = random_inputs(device, 777, 2001, dtype)
    budgets, shares = proxyattn.estimate_budgets(q, k, 0.9), proxyattn.estimate_shares(q, k)
    for threads in (1, 2, 3):
        set_threads(threads)
        assert torch.equal(proxyattn.estimate_budgets(q, k, 0.9), budgets)
        assert_same_bits(proxyattn.estimate_shares(q, k), shares)


def test_no_queries_or_keys_have_no_share(device):
    """Nothing sums to nothing: NaN, as of any sum that is not positive."""
    q, k = random_inputs(device, 100, 200)
    assert proxyattn.estimate_shares(q[:0], k[:0]).shape == (0, 4)
    for empty in [(q[:, :0], k), (q[:, :0], k[:, :0])]:
        assert proxyattn.estimate_shares(*empty).isnan().tolist() == [[True] * 4] * 2
    assert proxyattn.estimate_shares(q, k[:, :0], causal=False).isnan().all()


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
def test_nan_takes_all_blocks_and_has_no_share(device, dtype, poisoned):
    q, k = random_inputs(device, 130, 500, dtype)
    budgets, shares = proxyattn.estimate_budgets(q, k, 0.3, 64), proxyattn.estimate_shares(q, k, 64)
    assert (budgets < 8).all() and shares.isfinite().all()
    if poisoned == "q":
        q[1, 129, 2, 63] = torch.nan
        broken = (1, slice(2, 3))
    else:
        k[1, 3, 1, 0] = torch.nan
        broken = (1, slice(2, 4))
    budgets[broken], shares[broken] = 8, torch.nan
    assert torch.equal(proxyattn.estimate_budgets(q, k, 0.3, 64), budgets)
    assert_within(proxyattn.estimate_shares(q, k, 64), to_numpy(shares), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_logits(device, dtype):
    """+-10^4: one block holds everything."""
    k = torch.zeros(1, 640, 1, 64, dtype=dtype, device=device)
    k[0, :, 0, 0] = -100
    k[0, 200, 0, 0] = 100
    q = 100 * ones_query(64, dtype, device)
    assert proxyattn.estimate_budgets(q, k, 0.999, 64, causal=False, scale=1.0).tolist() == [[1]]
    for sinks, share in [(3, 0.0), (4, 1.0)]:
        shares = proxyattn.estimate_shares(q, k, 64, False, 1.0, sinks)
        assert_within(shares, np.array([[share]]), 1e-4)


def test_keys_at_minus_infinity_hold_nothing(device):
    k = torch.zeros(1, 256, 1, 64, dtype=torch.bfloat16, device=device)
    k[0, :128, 0, 0] = -torch.inf
    q = ones_query(64, torch.bfloat16, device)
    for gamma, blocks in [(0.4, 1), (0.6, 2), (0.9999, 2), (1.0, 4)]:
        budgets = proxyattn.estimate_budgets(q, k, gamma, 64, causal=False, scale=1.0)
        assert budgets.tolist() == [[blocks]]
    for sinks, share in [(2, 0.0), (3, 0.5), (4, 1.0)]:
        shares = proxyattn.estimate_shares(q, k, 64, False, 1.0, sinks)
        assert_within(shares, np.array([[share]]), 1e-5)
    k[..., 0] = -torch.inf  # nothing is left
    assert proxyattn.estimate_budgets(q, k, 0.4, 64, causal=False, scale=1.0).tolist() == [[4]]
    assert proxyattn.estimate_shares(q, k, 64, causal=False, scale=1.0).isnan().all()


@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)], ids=["tokens", "batch"])
def test_70000_rows(device, shape):
    rng = np.random.default_rng(5)
    k = normal(rng, (*shape, 1, 64), torch.bfloat16)
    q = 4 * k[:, -64:]
    tensors = [lay_out(x, torch.bfloat16, device) for x in (q, k)]
    budgets = proxyattn.estimate_budgets(*tensors, 0.9, 64)
    shares = proxyattn.estimate_shares(*tensors, 64)
    if shape[0] > 1:
        assert (budgets == 1).all() and (shares == 1).all()
    else:
        a = reference.block_mass(q, k, 64, True)
        assert_budgets(budgets, reference.budgets_of(a, 0.9), reference.reached(a), 0.9)
        assert_shares(shares, a, reference.last_forced(64, shape[1], 64, True), q, k)
