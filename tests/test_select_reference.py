"""select_blocks against the reference, over shapes, modes and awkward scores."""

from dataclasses import dataclass

import numpy as np
import proxyattn
import pytest
import torch
from inputs import balanced
from lists import assert_counts, assert_same_lists
from reference import select as reference

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    batch: int
    lengths: tuple
    heads: tuple
    block_size: int
    budget_mode: str
    min_budget: int
    num_sink_blocks: int
    num_local_blocks: int
    values: str

    def __str__(self):
        q_len, kv_len, causal = self.lengths
        return (
            f"b{self.batch}-m{q_len}-n{kv_len}-{'causal' if causal else 'full'}-"
            f"h{self.heads[0]}-g{self.heads[1]}-k{self.block_size}-{self.budget_mode}-"
            f"min{self.min_budget}-sink{self.num_sink_blocks}-local{self.num_local_blocks}-"
            f"{self.values}"
        )

    @property
    def settings(self):
        return {
            "budget_mode": self.budget_mode,
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
        "budget_mode": ("last_block", "coverage"),
        "min_budget": (0, 0, 1, 200, 1024),
        "num_sink_blocks": (0, 1, 2, 100),
        "num_local_blocks": (0, 1, 3, 100),
        "values": ("random", "ties", "special", "dyadic"),
    }
    return [Case(**values) for values in balanced(axes, count, seed)]


def random_scores(rng, case, shape, visible):
    """Peaks and masses that score_blocks might give. Those of "dyadic" cases are multiples of
    2^-12, whose sums are exact in any order, so that no share is ever nearly reached."""
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


def check(case, device):
    q_len, kv_len, causal = case.lengths
    q_heads, groups = case.heads
    geometry = (q_len, kv_len, case.block_size, causal)
    num_rows, num_blocks = (-(-n // case.block_size) for n in (q_len, kv_len))
    rng = np.random.default_rng([q_len, kv_len, q_heads, case.block_size])
    visible = np.array([reference.num_visible(m, *geometry) for m in range(num_rows)])
    peak, mass = random_scores(rng, case, (case.batch, groups, num_rows, num_blocks), visible)
    budgets = rng.integers(1, num_blocks + 1, size=(case.batch, q_heads))

    indices, counts = proxyattn.select_blocks(
        torch.from_numpy(peak).to(device),
        torch.from_numpy(mass).to(device) if case.budget_mode == "coverage" else None,
        torch.from_numpy(budgets).to(device, torch.int32),
        *geometry,
        **case.settings,
    )
    mass = mass.astype(np.float64)
    expected_indices, expected_counts = reference.select_blocks(
        peak, mass, budgets, *geometry, **case.settings
    )
    assert_same_lists(indices, expected_indices)
    if case.budget_mode == "last_block" or case.values == "dyadic":
        assert np.array_equal(counts.cpu().numpy(), expected_counts)
    else:
        assert_coverage(case, counts, peak, mass, budgets, expected_indices, expected_counts)


def assert_coverage(case, counts, peak, mass, budgets, indices, expected):
    q_len, kv_len, causal = case.lengths
    geometry = (q_len, kv_len, case.block_size, causal)
    forcing = (case.num_sink_blocks, case.num_local_blocks)
    batch, q_heads, num_rows = expected.shape
    heads_per_group = q_heads // peak.shape[1]
    covered, least = [], []
    for m in range(num_rows):
        visible = reference.num_visible(m, *geometry)
        forced = len(reference.forced_blocks(m, *geometry, *forcing))
        least.append(min(max(1, forced, -(-case.min_budget // case.block_size)), visible))
    for b in range(batch):
        covered.append([])
        for h in range(q_heads):
            rankings = indices[b, h // heads_per_group]
            rows = mass[b, h // heads_per_group]
            covered[-1].append(
                [
                    reference.ranked_shares(row, ranking[ranking >= 0])
                    for row, ranking in zip(rows, rankings, strict=True)
                ]
            )
    targets = reference.coverage_targets(peak, mass, budgets, *geometry, *forcing)
    assert_counts(counts, expected, covered, targets, least)


@pytest.mark.parametrize("case", cases(240, seed=1), ids=str)
def test_reference(device, case):
    check(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(2000, seed=2), ids=str)
def test_reference_sweep(device, case):
    check(case, device)
