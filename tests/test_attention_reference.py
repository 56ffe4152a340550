"""block_sparse_attention against the reference, over shapes, lists, dtypes and layouts."""

from dataclasses import dataclass

import numpy as np
import plain
import proxyattn
import pytest
import torch
from inputs import DTYPES, HEAD_DIMS, LAYOUTS, LENGTHS, balanced, lay_out, name_of, normal
from reference import attention as reference
from tolerance import assert_close, assert_within, fp32_attention_errors

#: (q_heads, kv_heads, list_heads) where neither the key heads nor the lists divide the other: heads
#: that share a list do not all share their keys.
NOT_NESTED = ((6, 2, 3), (6, 3, 2), (12, 6, 4), (12, 4, 6), (28, 4, 14), (24, 3, 4))

#: Never read past a list's count, so anything may stand there.
FILLERS = (-1, 2**31 - 1, -(2**31), 0)


@dataclass(frozen=True)
class Case:
    batch: int
    lengths: tuple
    heads: tuple
    head_dim: int
    block_size: int
    lists: str
    scale: float | None
    spread: float
    dtype: torch.dtype
    layouts: tuple

    def __str__(self):
        q_len, kv_len, causal = self.lengths
        return (
            f"b{self.batch}-m{q_len}-n{kv_len}-{'causal' if causal else 'full'}-"
            f"h{'x'.join(map(str, self.heads))}-d{self.head_dim}-k{self.block_size}-{self.lists}-"
            f"scale{self.scale}-x{self.spread:g}-{name_of(self.dtype)}-{'-'.join(self.layouts)}"
        )


def cases(count, seed):
    axes = {
        "batch": (1, 3),
        "lengths": LENGTHS,
        # (q_heads, kv_heads, list_heads): lists by group, by head, for all, and by half a group
        "heads": (
            (1, 1, 1),
            (4, 4, 4),
            (4, 4, 2),
            (4, 1, 1),
            (8, 2, 2),
            (8, 2, 8),
            (8, 2, 1),
            (7, 1, 7),
            (14, 2, 2),
            (8, 1, 2),
        ),
        "head_dim": HEAD_DIMS,
        "block_size": (64, 128),
        "lists": ("random", "all", "one", "ragged", "wide"),
        "scale": (None, 0.2),
        "spread": (0.5, 1.0, 2.0),
        "dtype": DTYPES,
        "layouts": tuple(
            zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], LAYOUTS[3:] + LAYOUTS[:3], strict=True)
        ),
    }
    return [Case(**values) for values in balanced(axes, count, seed)]


def make_lists(rng, kind, batch, q_heads, list_heads, num_rows, num_blocks):
    """(indices, counts): unique blocks in any order, visible or not.

    "ragged" counts start at none, "wide" lists have more room than there are blocks.
    """
    capacity = {"one": 1, "wide": num_blocks + 3}.get(kind, num_blocks)
    order = rng.random((batch, list_heads, num_rows, num_blocks)).argsort(axis=-1)
    indices = rng.choice(FILLERS, size=(batch, list_heads, num_rows, capacity))
    indices[..., : min(capacity, num_blocks)] = order[..., :capacity]
    low, high = {"all": (num_blocks, num_blocks), "one": (1, 1), "ragged": (0, num_blocks)}.get(
        kind, (1, num_blocks)
    )
    counts = rng.integers(low, high + 1, size=(batch, q_heads, num_rows))
    per_list = counts.reshape(batch, list_heads, -1, num_rows).max(axis=2)
    unused = np.arange(capacity) >= per_list[..., None]
    indices[unused] = rng.choice(FILLERS, size=np.count_nonzero(unused))
    return indices, counts


def check(case, device):
    q_len, kv_len, causal = case.lengths
    q_heads, kv_heads, list_heads = case.heads
    rng = np.random.default_rng([q_len, kv_len, case.head_dim, case.block_size])
    q, k, v = (
        normal(rng, (case.batch, n, heads, case.head_dim), case.dtype, spread)
        for n, heads, spread in (
            (q_len, q_heads, case.spread),
            (kv_len, kv_heads, case.spread),
            (kv_len, kv_heads, 1.0),
        )
    )
    num_rows, num_blocks = (-(-n // case.block_size) for n in (q_len, kv_len))
    indices, counts = make_lists(
        rng, case.lists, case.batch, q_heads, list_heads, num_rows, num_blocks
    )
    tensors = [
        lay_out(x, case.dtype, device, layout)
        for x, layout in zip((q, k, v), case.layouts, strict=True)
    ]
    lists = [torch.from_numpy(x).to(device, torch.int32) for x in (indices, counts)]
    settings = (case.block_size, causal, case.scale)

    out, lse = proxyattn.block_sparse_attention(*tensors, *lists, *settings, return_lse=True)
    want_out, want_lse = reference.block_sparse_attention(q, k, v, indices, counts, *settings)
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    out_error, lse_error = fp32_attention_errors(q, k, v, want_lse, case.scale)
    assert_within(lse, want_lse, lse_error, "lse")
    if case.dtype == torch.float32:
        assert_within(out, want_out, out_error, "out")
    else:
        seen = plain.seen_keys(*lists, q_len, kv_len, case.block_size, causal)
        assert_close(out, want_out, plain.attention(*tensors, seen, case.scale), "out")


@pytest.mark.parametrize("case", cases(240, seed=1), ids=str)
def test_reference(device, case):
    check(case, device)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("heads", NOT_NESTED, ids=lambda heads: "x".join(map(str, heads)))
def test_lists_that_do_not_nest(device, heads, block_size, head_dim):
    """Every head reads its own list and its own keys, whatever else its neighbours share."""
    lengths, dtype, layouts = (150, 521, True), torch.bfloat16, ("plain",) * 3
    case = Case(2, lengths, heads, head_dim, block_size, "ragged", None, 1.0, dtype, layouts)
    check(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(1500, seed=2), ids=str)
def test_reference_sweep(device, case):
    check(case, device)
