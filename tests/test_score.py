"""score_blocks: how much the proxy heads attend to each key block."""

from dataclasses import dataclass
from math import exp, log

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
from reference import score as reference
from tolerance import (
    FP32_UNIT,
    assert_same_bits,
    assert_within,
    log_sum_error,
    logit_error,
    to_numpy,
)


def one_hot_rows(values, dtype, device):
    """[1, tokens, 1, 64] with values[token] in element 0 and zeros elsewhere."""
    x = torch.zeros(1, len(values), 1, 64, dtype=dtype, device=device)
    x[0, :, 0, 0] = torch.tensor(values, dtype=dtype)
    return x


def logs(rows):
    return torch.tensor([[rows]], dtype=torch.float64).log().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_literal_two_tokens(device, dtype):
    """Stride 8 in blocks of 64 leaves 8 rows a block; 9 tokens leave two rows and one block."""
    q = one_hot_rows([1, 1], dtype, device)
    k = one_hot_rows([0, 3], dtype, device)
    # Row 0 sees key 0 alone, P = 1. Row 1: logits 0 and 3. Its mass lies in the one block too.
    peak, mass = proxyattn.score_blocks(q, k, 9, 9, 8, 64, scale=1.0, with_mass=True)
    assert_within(peak, logs([[1.0]]), 1e-6)
    assert_within(mass, np.ones((1, 1, 1, 1)), 1e-6)


def test_literal_two_blocks(device):
    """Keys 0 and 64 of a non-causal call: logits 0 and log 3, so P is 1/4 and 3/4."""
    q = one_hot_rows([1.0], torch.float16, device)
    k = one_hot_rows([0.0] * 8 + [1.0], torch.float16, device)
    k[0, 1:8, 0, 0] = -30.0  # keys 8, 16, ... 56 get nothing
    peak, mass = proxyattn.score_blocks(
        q, k, 1, 65, 8, 64, causal=False, scale=log(3), with_mass=True
    )
    assert_within(peak, logs([[0.25, 0.75]]), 1e-5)
    assert_within(mass, np.array([[[[0.25, 0.75]]]]), 1e-5)


def test_literal_peak_is_of_single_pairs_and_mass_of_blocks(device):
    """Block 0 has 8 keys of weight 1, block 1 one of weight 4: it has the peak, 0 has the mass."""
    q = one_hot_rows([1.0], torch.bfloat16, device)
    k = one_hot_rows([0.0] * 8 + [1.0], torch.bfloat16, device)
    peak, mass = proxyattn.score_blocks(
        q, k, 1, 65, 8, 64, causal=False, scale=log(4), with_mass=True
    )
    assert_within(peak, logs([[1 / 12, 4 / 12]]), 1e-5)
    assert_within(mass, np.array([[[[8 / 12, 4 / 12]]]]), 1e-5)


def test_literal_causal_positions(device):
    """Two queries at positions 64 and 72 of 80 keys; sampled keys are 0, 8, ..., 72.

    The first sees keys 0 to 64, nine sampled ones, the second all ten; all logits are 0.
    """
    q = one_hot_rows([0.0, 0.0], torch.float16, device)
    k = one_hot_rows([0.0] * 10, torch.float16, device)
    peak, mass = proxyattn.score_blocks(q, k, 16, 80, 8, 64, with_mass=True)
    assert_within(peak, logs([[1 / 9, 1 / 9]]), 1e-6)
    assert_within(mass, np.array([[[[(8 / 9 + 8 / 10) / 2, (1 / 9 + 2 / 10) / 2]]]]), 1e-6)


def test_literal_invisible_blocks(device):
    """128 tokens, stride 1, equal logits: row i has P = 1 / (i + 1)."""
    q = k = torch.zeros(1, 128, 1, 64, dtype=torch.bfloat16, device=device)
    peak, mass = proxyattn.score_blocks(q, k, 128, 128, 1, 64, with_mass=True)
    with np.errstate(divide="ignore"):
        assert_within(peak, logs([[1.0, 0.0], [1 / 65, 1 / 65]]), 1e-6)
    first = sum(64 / i for i in range(65, 129)) / 64
    assert_within(mass, np.array([[[[1.0, 0.0], [first, 1 - first]]]]), 1e-6)


def test_literal_proxies_that_share_a_key_proxy(device):
    """Proxy c of four reads key proxy c // 2: on the first, P is 1/4 and 3/4, on the second 3/4 and
    1/4, and half and half for a query of zero, the third."""
    q = torch.cat([one_hot_rows([x], torch.float16, device) for x in (1, 1, 0, 1)], dim=2)
    k = torch.cat([one_hot_rows(x, torch.float16, device) for x in ([0, 1], [1, 0])], dim=2)
    k = torch.cat([k[:, :1], k.new_zeros(1, 7, 2, 64), k[:, 1:]], dim=1)
    q[..., 1] = 1.0
    k[0, 1:8, :, 1] = -30.0  # keys 8, 16, ... 56 get nothing
    peak, mass = proxyattn.score_blocks(
        q, k, 1, 65, 8, 64, causal=False, scale=log(3), with_mass=True
    )
    want = [[[0.25, 0.75]], [[0.25, 0.75]], [[0.5, 0.5]], [[0.75, 0.25]]]
    assert_within(peak, np.log([want]), 1e-5)
    assert_within(mass, np.array([want]), 1e-5)
    # One key proxy for all four.
    peak, _ = proxyattn.score_blocks(q, k[:, :, 1:], 1, 65, 8, 64, causal=False, scale=log(3))
    want = [[[0.75, 0.25]], [[0.75, 0.25]], [[0.5, 0.5]], [[0.75, 0.25]]]
    assert_within(peak, np.log([want]), 1e-5)


def test_literal_default_scale(device):
    """1 / sqrt(64) = 1/8 of a logit of 8 x 1."""
    q, k = one_hot_rows([8], torch.float16, device), one_hot_rows([0, 1], torch.float16, device)
    peak, mass = proxyattn.score_blocks(q, k, 1, 16, 8, 64, causal=False)
    assert_within(peak, logs([[exp(1) / (1 + exp(1))]]), 1e-6)
    assert mass.shape == (0,) and mass.dtype == torch.float32


@dataclass(frozen=True)
class Case:
    batch: int
    lengths: tuple
    proxies: tuple
    head_dim: int
    stride: int
    block_size: int
    scale: float | None
    spread: float
    dtype: torch.dtype
    layouts: tuple

    def __str__(self):
        q_len, kv_len, causal = self.lengths
        return (
            f"b{self.batch}-m{q_len}-n{kv_len}-{'causal' if causal else 'full'}-"
            f"g{'x'.join(map(str, self.proxies))}-"
            f"d{self.head_dim}-s{self.stride}-k{self.block_size}-scale{self.scale}-"
            f"x{self.spread:g}-{name_of(self.dtype)}-{'-'.join(self.layouts)}"
        )


def cases(count, seed):
    axes = {
        "batch": (1, 3),
        "lengths": LENGTHS,
        "proxies": ((1, 1), (2, 2), (5, 5), (4, 1), (4, 2), (6, 3)),
        "head_dim": HEAD_DIMS,
        "stride": (1, 2, 4, 8),
        "block_size": (64, 128),
        "scale": (None, 0.3),
        "spread": (0.5, 1.0, 3.0),
        "dtype": DTYPES,
        "layouts": tuple(zip(LAYOUTS, LAYOUTS[2:] + LAYOUTS[:2], strict=True)),
    }
    return [Case(**values) for values in balanced(axes, count, seed)]


def check(case, device):
    q_len, kv_len, causal = case.lengths
    rng = np.random.default_rng([q_len, kv_len, case.head_dim, case.stride])
    q, k = (
        normal(
            rng,
            (case.batch, -(-n // case.stride), proxies, case.head_dim),
            case.dtype,
            case.spread,
        )
        for n, proxies in zip((q_len, kv_len), case.proxies, strict=True)
    )
    tensors = [
        lay_out(x, case.dtype, device, layout)
        for x, layout in zip((q, k), case.layouts, strict=True)
    ]
    settings = (q_len, kv_len, case.stride, case.block_size, causal, case.scale)
    actual = proxyattn.score_blocks(*tensors, *settings, with_mass=True)
    expected = reference.score_blocks(q, k, *settings)
    assert_right(actual, expected, q, k, case.scale)
    peak, mass = proxyattn.score_blocks(*tensors, *settings)
    assert_right((peak, actual[1]), expected, q, k, case.scale)
    assert mass.shape == (0,)


def assert_right(actual, expected, q, k, scale=None):
    """q and k are the proxies that both were computed from."""
    for tensor in actual:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    peak, mass = expected
    error = log_sum_error(peak, logit_error(q, k, scale), k.shape[1])
    assert_within(actual[0], peak, error, "peak")
    smallest_normal = 2.0**-126
    assert_within(actual[1], mass, mass * np.expm1(error) + smallest_normal, "mass")


@pytest.mark.parametrize("case", cases(200, seed=1), ids=str)
def test_reference(device, case):
    check(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(1000, seed=2), ids=str)
def test_reference_sweep(device, case):
    check(case, device)


def random_proxies(device, q_len, kv_len, stride, dtype=torch.bfloat16, proxies=(2, 2)):
    return [
        torch.randn(2, -(-n // stride), heads, 64).mul(2).to(dtype).to(device)
        for n, heads in zip((q_len, kv_len), proxies, strict=True)
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [64, 128])
def test_mass_rows_sum_to_one_and_bound_peaks(device, causal, block_size):
    q, k = random_proxies(device, 333, 777, 2, proxies=(4, 2))
    peak, mass = proxyattn.score_blocks(
        q, k, 333, 777, 2, block_size, causal=causal, with_mass=True
    )
    np.testing.assert_allclose(to_numpy(mass).sum(-1), 1.0, atol=1e-5)
    assert torch.equal(peak == -torch.inf, mass == 0)
    assert (peak <= 0).all()


def test_causal_future_does_not_matter(device):
    """What a query block can't see changes nothing in its row."""
    q, k = random_proxies(device, 256, 256, 4)
    changed = k.clone()
    changed[:, 32:] = torch.nan  # tokens 128 and on
    before, after = (
        proxyattn.score_blocks(q, x, 256, 256, 4, 64, with_mass=True) for x in (k, changed)
    )
    for first, second in zip(before, after, strict=True):
        assert_same_bits(first[:, :, :2], second[:, :, :2])


def test_rows_are_independent(device):
    """Later queries and single heads alone give the scores of the whole, a batch entry its bits."""
    q, k = random_proxies(device, 512, 512, 4)
    whole = proxyattn.score_blocks(q, k, 512, 512, 4, 128, with_mass=True)
    part = proxyattn.score_blocks(q[1:, 64:, 1:], k[1:, :, 1:], 256, 512, 4, 128, with_mass=True)
    want = [to_numpy(x[1:, 1:, 2:]) for x in whole]
    error = 2 * log_sum_error(want[0], logit_error(to_numpy(q), to_numpy(k)), k.shape[1])
    assert_within(part[0], want[0], error, "peak")
    assert_within(part[1], want[1], np.expm1(error), "mass")
    batch_entry = proxyattn.score_blocks(q[1:], k[1:], 512, 512, 4, 128, with_mass=True)
    for got, want in zip(batch_entry, whole, strict=True):
        assert_same_bits(got, want[1:])


@pytest.mark.parametrize("causal", [True, False])
def test_a_shared_key_proxy_is_as_good_as_copies(device, causal):
    q, k = random_proxies(device, 300, 500, 2, proxies=(6, 2))
    settings = {"stride": 2, "block_size": 64, "causal": causal, "with_mass": True}
    shared = proxyattn.score_blocks(q, k, 300, 500, **settings)
    copies = proxyattn.score_blocks(q, k.repeat_interleave(3, dim=2), 300, 500, **settings)
    error = 2 * log_sum_error(
        to_numpy(copies[0]), logit_error(to_numpy(q), to_numpy(k)), k.shape[1]
    )
    assert_within(shared[0], to_numpy(copies[0]), error, "peak")
    assert_within(shared[1], to_numpy(copies[1]), np.expm1(error), "mass")


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=name_of)
def test_same_bits_every_time(device, dtype, set_threads):
    q, k = random_proxies(device, 700, 900, 2, dtype, proxies=(4, 1))
    first = proxyattn.score_blocks(q, k, 700, 900, 2, 64, with_mass=True)
    for threads in (1, 2, 3):
        set_threads(threads)
        again = proxyattn.score_blocks(q, k, 700, 900, 2, 64, with_mass=True)
        for got, want in zip(again, first, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "causal"), [(0, 100, True), (0, 0, True), (100, 0, False)]
)
def test_empty(device, q_len, kv_len, causal):
    q, k = random_proxies(device, q_len, kv_len, 4, proxies=(4, 2))
    peak, mass = proxyattn.score_blocks(q, k, q_len, kv_len, 4, 64, causal, with_mass=True)
    assert peak.shape == mass.shape == (2, 4, -(-q_len // 64), -(-kv_len // 64))
    peak, mass = proxyattn.score_blocks(q[:0], k[:0], q_len, kv_len, 4, 64, causal, with_mass=True)
    assert peak.shape == mass.shape == (0, 4, -(-q_len // 64), -(-kv_len // 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_logits_do_not_overflow(device, dtype):
    """Logits of +-10^4, far beyond exp in fp32: log-probabilities stay exact, 0 and -10^4 apart."""
    q = one_hot_rows([100.0] * 8, dtype, device)
    k = one_hot_rows([-100.0] * 8 + [100.0] + [0.0] * 7, dtype, device)
    peak, mass = proxyattn.score_blocks(
        q, k, 64, 128, 8, 64, causal=False, scale=1.0, with_mass=True
    )
    assert_within(peak, np.array([[[[-20_000.0, 0.0]]]]), 20_000 * 4 * FP32_UNIT)
    # The probability is a difference of such logits, which fp32 holds to 1e-3.
    assert_within(mass, np.array([[[[0.0, 1.0]]]]), 1e-4)


def test_equal_keys_tie_exactly(device):
    """All keys equal: every visible block has the very same peak, as ties are broken by place."""
    q = torch.randn(1, 96, 1, 128).to(torch.bfloat16).to(device)
    k = torch.randn(1, 1, 1, 128).to(torch.bfloat16).to(device).expand(1, 96, 1, 128)
    peak, _ = proxyattn.score_blocks(q, k, 384, 384, 4, 64, causal=False)
    assert torch.equal(peak, peak[..., :1].expand_as(peak))
    np.testing.assert_allclose(to_numpy(peak), -log(96), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_key_shows_in_the_rows_that_see_it(device, dtype):
    q, k = (x.to(dtype) for x in random_proxies(device, 256, 256, 4))
    k[0, 20, 0, 7] = torch.nan  # token 80: query blocks 1, 2 and 3 have rows that see it
    peak, mass = proxyattn.score_blocks(q, k, 256, 256, 4, 64, with_mass=True)
    expected = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    for m in (1, 2, 3):
        expected[0, 0, m, : m + 1] = True
    assert torch.equal(peak.isnan().cpu(), expected)
    assert torch.equal(mass.isnan().cpu(), expected)
    assert torch.equal(peak.isneginf().cpu()[..., 0, :], torch.arange(4).gt(0).expand(2, 2, 4))


def test_nan_query_stays_in_its_block(device):
    q, k = random_proxies(device, 256, 256, 4)
    clean, _ = proxyattn.score_blocks(q, k, 256, 256, 4, 64)
    q[1, 17, 1, 0] = torch.nan  # query block 1
    peak, _ = proxyattn.score_blocks(q, k, 256, 256, 4, 64)
    assert peak.isnan().nonzero().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    clean[1, 1, 1, :2] = torch.nan
    assert_same_bits(peak.nan_to_num(9.0), clean.nan_to_num(9.0))


def test_minus_infinity_is_a_probability_of_zero(device):
    """Keys 64 and on get logit -inf: their block is visible, with peak -inf and no mass."""
    q = one_hot_rows([1.0] * 16, torch.float16, device)
    k = one_hot_rows([0.0] * 8 + [-torch.inf] * 8, torch.float16, device)
    peak, mass = proxyattn.score_blocks(q, k, 128, 128, 8, 64, causal=False, with_mass=True)
    assert_within(peak, np.array([[[[-log(8), -np.inf]] * 2]]), 1e-6)
    assert_within(mass, np.array([[[[1.0, 0.0]] * 2]]), 1e-6)


@pytest.mark.parametrize("batch", [1, 70_000], ids=["tokens", "batch"])
def test_70000_rows(device, batch):
    q_len = 70_000 // batch
    rng = np.random.default_rng(3)
    q = normal(rng, (batch, -(-q_len // 8), 1, 64), torch.bfloat16)
    settings = (q_len, q_len, 8, 128, True)
    tensor = lay_out(q, torch.bfloat16, device)
    actual = proxyattn.score_blocks(tensor, tensor, *settings, with_mass=True)
    if batch == 1:  # the first, the middle and the last query block
        rows = [0, 273, -(-q_len // 128) - 1]
        expected = reference.score_blocks(q, q, *settings, rows=rows)
        actual = [x[:, :, rows] for x in actual]
    else:  # one token that sees itself
        expected = np.zeros((batch, 1, 1, 1)), np.ones((batch, 1, 1, 1))
    assert_right(actual, expected, q, q)
