"""With shares given, a query block reads what it reads whether its prompt comes whole or in chunks
cut at multiples of the block, alone or in a batch."""

from dataclasses import dataclass

import proxyattn
import pytest
import torch
from chain import random_inputs, scores_of
from inputs import HEAD_DIMS, balanced, runs_sm90
from lists import assert_same_rankings, assert_top_p_counts
from tolerance import assert_same_bits, order_error, to_numpy


@dataclass(frozen=True)
class Case:
    length: int
    heads: tuple
    head_dim: int
    stride: int
    pooling: str
    block_size: int
    gamma: float
    forcing: tuple

    def __str__(self):
        return (
            f"n{self.length}-h{'x'.join(map(str, self.heads))}-d{self.head_dim}-s{self.stride}-"
            f"{self.pooling}-k{self.block_size}-gamma{self.gamma}-"
            f"min{self.forcing[0]}-sink{self.forcing[1]}-local{self.forcing[2]}"
        )

    @property
    def scoring(self):
        return {
            "stride": self.stride,
            "pooling": self.pooling,
            "block_size": self.block_size,
            "num_proxy_heads": self.heads[2],
        }

    @property
    def selection(self):
        names = ("min_budget", "num_sink_blocks", "num_local_blocks")
        return {"gamma": self.gamma, **dict(zip(names, self.forcing, strict=True))}


def cases(count, seed, lengths):
    axes = {
        "length": lengths,
        "heads": ((4, 2, 1), (4, 2, 2), (4, 2, 4), (7, 1, 7)),
        "head_dim": HEAD_DIMS,
        "stride": (1, 2, 4, 8),
        "pooling": ("mean", "first"),
        "block_size": (64, 128),
        "gamma": (0.5, 0.8, 0.9),
        "forcing": ((0, 1, 1), (0, 0, 0), (200, 2, 2)),
    }
    return [Case(**values) for values in balanced(axes, count, seed)]


def check(case, device, cuts):
    """`cuts` are query blocks that chunks begin with; the last of them reaches to the end."""
    block_size, length = case.block_size, case.length
    tensors = random_inputs(device, length, length, case.heads[:2], head_dim=case.head_dim)
    shares = torch.rand(2, case.heads[0]).to(device)
    settings = {**case.scoring, **case.selection}
    lists = proxyattn.choose_blocks(*tensors[:2], **settings, shares=shares)
    results = proxyattn.proxy_attention(*tensors, **settings, shares=shares, return_lse=True)
    scores = [to_numpy(x) for x in scores_of(*tensors[:2], **case.scoring)]
    assert_right(lists, scores, shares, (length, length), case)

    exact = device == "cpu" or runs_sm90(device)
    num_rows = -(-length // block_size)
    chunks = zip(cuts, (*cuts[1:], num_rows), strict=True)
    for begin, end in [(0, num_rows), *chunks]:  # the whole of one prompt alone, too
        first, last = begin * block_size, min(end * block_size, length)
        q, k, v = tensors[0][1:, first:last], tensors[1][1:, :last], tensors[2][1:, :last]
        alone = {**settings, "shares": shares[1:]}
        indices, counts = proxyattn.choose_blocks(q, k, **alone)
        out, lse = proxyattn.proxy_attention(q, k, v, **alone, return_lse=True)
        want_indices = lists[0][1:, :, begin:end, :end]
        want_counts = lists[1][1:, :, begin:end]
        want_out, want_lse = results[0][1:, first:last], results[1][1:, :, first:last]
        if exact:
            assert torch.equal(indices, want_indices) and torch.equal(counts, want_counts)
        else:
            rows_seen = [x[1:, :, begin:end, :end] for x in scores]
            assert_same_rankings(indices, to_numpy(want_indices), rows_seen[0])
            assert_right((indices, counts), rows_seen, shares[1:], (last - first, last), case)
        # A chunk that the settings say is read whole may be read in another order.
        if exact and -(-case.forcing[0] // block_size) < end:
            assert_same_bits(out, want_out)
            assert_same_bits(lse, want_lse)
        else:  # where the same blocks were taken, the same comes of it
            same = (counts == want_counts).repeat_interleave(block_size, 2)[:, :, : last - first]
            error = (out - want_out).abs().amax(-1).transpose(1, 2)
            assert torch.where(same, error, 0).max() <= order_error(want_out)
            assert torch.where(same, lse - want_lse, 0).abs().max() <= 1e-4


def assert_right(lists, scores, shares, lengths, case):
    """The lists' counts for the scores of these rows, in numpy."""
    geometry = (*lengths, case.block_size, True)
    rankings, mass, shares = to_numpy(lists[0]).astype(int), scores[1], to_numpy(shares)
    close = assert_top_p_counts(lists[1], rankings, mass, shares, geometry, **case.selection)
    assert close <= 0.05 * lists[1].numel() + 1


@pytest.mark.parametrize("case", cases(24, 1, (704, 730, 1021)), ids=str)
def test_chunks_read_what_the_whole_prompt_would(device, case):
    check(case, device, cuts=(0, 1, 4))


@pytest.mark.parametrize("case", cases(12, 2, (8192, 20_011)), ids=str)
def test_long_chunks_read_what_the_whole_prompt_would(cuda, case):
    """Keys of other numbers are worked on in other pieces."""
    check(case, cuda, cuts=(0, 5, 32, 61))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(8, 3, (70_001,)), ids=str)
def test_very_long_chunks_read_what_the_whole_prompt_would(cuda, case):
    check(case, cuda, cuts=(0, 100, 101, 500))


def test_without_shares_a_chunk_goes_by_its_own_end(device):
    """Which is why they can be carried: the last chunk's are those of the whole prompt."""
    q, k, _ = random_inputs(device, 700, 700)
    settings = {"gamma": 0.7, "min_budget": 0}
    indices, counts = proxyattn.choose_blocks(q, k, **settings)
    last = proxyattn.choose_blocks(q[:, 512:], k, **settings)
    assert torch.equal(last[0], indices[:, :, 8:]) and torch.equal(last[1], counts[:, :, 8:])
    first = (q[:, :512], k[:, :512])
    _, own = proxyattn.choose_blocks(*first, **settings)
    assert not torch.equal(own, counts[:, :, :8])
    carried = proxyattn.choose_blocks(*first, **settings, shares=proxyattn.estimate_shares(q, k))
    assert torch.equal(carried[0], indices[:, :, :8, :8])
    assert torch.equal(carried[1], counts[:, :, :8])
