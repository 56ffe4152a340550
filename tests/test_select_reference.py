"""select_blocks against the reference, over shapes, modes and awkward scores."""

from dataclasses import dataclass

import numpy as np
import proxyattn
import pytest
import torch
from inputs import balanced
from lists import assert_same_lists, assert_top_p_counts
from reference import select as reference
from reference.grid import num_visible
from scores import MODES, NEEDS_DTYPE

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    batch: int
    lengths: tuple
    heads: tuple
    block_size: int
    budget_mode: str
    gamma: float
    min_budget: int
    num_sink_blocks: int
    num_local_blocks: int
    values: str

    def __str__(self):
        q_len, kv_len, causal = self.lengths
        return (
            f"b{self.batch}-m{q_len}-n{kv_len}-{'causal' if causal else 'full'}-"
            f"h{self.heads[0]}-g{self.heads[1]}-k{self.block_size}-{self.budget_mode}-"
            f"gamma{self.gamma}-min{self.min_budget}-sink{self.num_sink_blocks}-local{self.num_local_blocks}-"
            f"{self.values}"
        )

    @property
    def forcing(self):
        return {
            "min_budget": self.min_budget,
            "num_sink_blocks": self.num_sink_blocks,
            "num_local_blocks": self.num_local_blocks,
        }


SELECT_LENGTHS = (
    (1, 1, True),
    (63, 64, True),
    (64, 64, True),
    (65, 65, True),
    (129, 129, True),
    (1, 1000, False),
    (100, 2049, True),
    (700, 700, True),
    (640, 1700, True),
    (333, 3001, False),
    (1300, 1300, True),
    (500, 127, False),
)


def cases(count, seed):
    axes = {
        "batch": (1, 3),
        "lengths": SELECT_LENGTHS,
        "heads": ((1, 1), (4, 4), (4, 1), (8, 2), (7, 1), (12, 3)),
        "block_size": (64, 128),
        "budget_mode": ("top_p", *MODES),
        "gamma": (0.0, 0.3, 0.7, 0.9, 0.95, 1.0),
        "min_budget": (0, 0, 1, 200, 1024),
        "num_sink_blocks": (0, 1, 2, 100),
        "num_local_blocks": (0, 1, 3, 100),
        "values": ("random", "ties", "special", "dyadic"),
    }
    return [Case(**values) for values in balanced(axes, count, seed)]


def random_scores(rng, case, shape, visible):
    """Peaks and masses that score_blocks might give. Masses of "dyadic" cases are multiples of
    2^-12, whose sums are exact in any order."""
    hidden = np.arange(shape[-1]) >= visible[:, None]
    peak = rng.normal(size=shape).astype(np.float32) * 3 - 5
    if case.values == "ties":
        peak = np.round(peak)
    if case.values == "special":
        for value in (NAN, INF, -INF, 0.0, -0.0):
            peak[rng.random(shape) < 0.1] = value
    peak = np.where(hidden, -np.inf, peak).astype(np.float32)
    if case.values == "dyadic":
        mass = np.zeros(shape)
        for row in np.ndindex(shape[:-1]):
            cuts = np.sort(rng.integers(0, 4097, size=visible[row[-1]] - 1))
            mass[row][: visible[row[-1]]] = np.diff([0, *cuts, 4096]) / 4096
        return peak, mass.astype(np.float32)
    mass = np.where(hidden, 0, rng.exponential(size=shape) ** 2)
    return peak, (mass / mass.sum(axis=-1, keepdims=True)).astype(np.float32)


def random_needs(rng, case, num_blocks):
    """Budgets, or shares; those of "special" cases are often at the ends or NaN."""
    shape = (case.batch, case.heads[0])
    if case.budget_mode == "last_block":
        return rng.integers(1, num_blocks + 1, size=shape)
    shares = rng.random(shape)
    if case.values == "special":
        for value in (0.0, 1.0, NAN):
            shares[rng.random(shape) < 0.15] = value
    return shares.astype(np.float32).astype(np.float64)


def inputs_of(case):
    """(peak, mass, needs) in numpy, and the geometry."""
    q_len, kv_len, causal = case.lengths
    geometry = (q_len, kv_len, case.block_size, causal)
    num_rows, num_blocks = (-(-n // case.block_size) for n in (q_len, kv_len))
    rng = np.random.default_rng([q_len, kv_len, case.heads[0], case.block_size])
    visible = np.array([num_visible(m, *geometry) for m in range(num_rows)])
    shape = (case.batch, case.heads[1], num_rows, num_blocks)
    peak, mass = random_scores(rng, case, shape, visible)
    return (peak, mass, random_needs(rng, case, num_blocks)), geometry


def check(case, device):
    (peak, mass, needs), (q_len, kv_len, block_size, causal) = inputs_of(case)
    geometry = (q_len, kv_len, block_size, causal)
    top_p = case.budget_mode == "top_p"
    indices, counts = proxyattn.select_blocks(
        torch.from_numpy(peak).to(device),
        torch.from_numpy(mass).to(device) if top_p else None,
        torch.from_numpy(needs).to(device, NEEDS_DTYPE[case.budget_mode]),
        q_len,
        kv_len,
        case.heads[0],
        block_size,
        causal,
        case.budget_mode,
        case.gamma,
        **case.forcing,
    )
    mass = mass.astype(np.float64)
    expected_indices, expected_counts = reference.select_blocks(
        peak, mass, needs, *geometry, case.budget_mode, case.gamma, **case.forcing
    )
    assert_same_lists(indices, expected_indices)
    if top_p:
        assert_top_p_counts(
            counts, expected_indices, mass, needs, geometry, case.gamma, **case.forcing
        )
    else:
        assert np.array_equal(counts.cpu().numpy(), expected_counts)


@pytest.mark.parametrize("case", cases(240, seed=1), ids=str)
def test_reference(device, case):
    check(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(2000, seed=2), ids=str)
def test_reference_sweep(device, case):
    check(case, device)


def test_the_margin_is_rarely_needed():
    """The reference cases test exact counts, but for the odd row of a head."""
    close = total = 0
    for case in cases(60, seed=1):
        if case.budget_mode == "last_block":
            continue
        (peak, mass, shares), geometry = inputs_of(case)
        mass = mass.astype(np.float64)
        settings = {"gamma": case.gamma, **case.forcing}
        indices, counts = reference.select_blocks(peak, mass, shares, *geometry, **settings)
        close += assert_top_p_counts(
            torch.from_numpy(counts), indices, mass, shares, geometry, **settings
        )
        total += counts.size
    assert close <= 0.01 * total and total > 1000
