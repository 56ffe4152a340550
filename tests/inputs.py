"""Inputs for the tests: random values rounded to a dtype, laid out in memory in many ways, and
lists of cases that give every value of every axis its share."""

import os

import numpy as np
import proxyattn
import torch

HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Those that this build has kernels for, so that a new one is tested from its first day.
HEAD_DIMS = tuple(sorted({config["head_dim"] for config in proxyattn.supported_configs()}))

#: Ways to hold a [batch, token, head, head_dim] tensor. All but the first leave room between or
#: around the rows, filled with NaN, so that a read outside the tensor shows.
LAYOUTS = ("plain", "heads_first", "packed", "padded", "unaligned")

#: (q_heads, kv_heads, proxy_heads): fewer proxies than kv heads, as many, and more.
HEADS = (
    (1, 1, 1),
    (4, 4, 4),
    (4, 4, 2),
    (4, 1, 1),
    (4, 1, 4),
    (8, 2, 1),
    (8, 2, 2),
    (8, 2, 4),
    (7, 1, 1),
    (7, 1, 7),
    (14, 2, 14),
    (16, 4, 1),
    (12, 4, 4),
    (12, 3, 6),
)

#: (q_len, kv_len, causal): one token, blocks of 64 and 128 and one more or less, primes, chunks of
#: a longer prompt, and more queries than keys.
LENGTHS = (
    (1, 1, True),
    (1, 65, True),
    (1, 257, False),
    (2, 130, True),
    (63, 63, True),
    (64, 64, True),
    (65, 65, True),
    (127, 127, False),
    (128, 128, True),
    (129, 129, True),
    (64, 320, True),
    (61, 449, True),
    (130, 191, True),
    (127, 384, False),
    (257, 257, True),
    (397, 397, True),
    (129, 65, False),
    (200, 1, False),
    (331, 64, False),
    (200, 521, True),
)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def runs_sm90(device):
    """Whether the newest kernels run, whose results don't depend on what else is worked on."""
    return (
        device == "cuda"
        and torch.cuda.get_device_capability() == (9, 0)
        and any(config["family"] == "sm90" for config in proxyattn.supported_configs())
        and os.environ.get("PROXYATTN_FAMILY", "") in ("", "sm90")
    )


def rounded(values, dtype):
    """The values as the dtype holds them, in float64."""
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(dtype).double().numpy()


def normal(rng, shape, dtype, spread=1.0):
    return rounded(rng.normal(size=shape) * spread, dtype)


def _storage(shape, dtype, layout):
    """An all-NaN tensor with a view of `shape` inside: (view, whole)."""
    batch, tokens, heads, head_dim = shape
    if layout == "plain":
        whole = torch.full(shape, torch.nan, dtype=dtype)
        return whole
    if layout == "heads_first":
        whole = torch.full((batch, heads, tokens, head_dim), torch.nan, dtype=dtype)
        return whole.transpose(1, 2)
    if layout == "packed":  # q, k and v of one projection
        whole = torch.full((batch, tokens, heads + 3, head_dim), torch.nan, dtype=dtype)
        return whole[:, :, 2 : 2 + heads]
    if layout == "padded":
        padded = (batch + 1, tokens + 3, heads, head_dim + 8)
        return torch.full(padded, torch.nan, dtype=dtype)[:batch, 1 : 1 + tokens, :, :head_dim]
    if layout == "unaligned":  # the base is off by one element, and so is every other row
        flat = torch.full((1 + batch * tokens * heads * (head_dim + 1),), torch.nan, dtype=dtype)
        return flat[1:].view(batch, tokens, heads, head_dim + 1)[..., :head_dim]
    raise ValueError(layout)


def lay_out(values, dtype, device, layout="plain"):
    """A tensor with the values (already rounded to dtype) in the given layout on the device."""
    empty = _storage(values.shape, dtype, layout)
    # The whole storage moves, so that strides and the surroundings are the same on the device.
    storage = torch.empty(0, dtype=dtype).set_(empty.untyped_storage())
    tensor = storage.to(device).as_strided(empty.shape, empty.stride(), empty.storage_offset())
    tensor.copy_(torch.from_numpy(values))
    return tensor


def balanced(axes, count, seed):
    """`count` dicts that pick one value of every axis; within an axis each value comes up equally
    often (give or take one), in an order that is shuffled for each axis on its own."""
    rng = np.random.default_rng(seed)
    columns = {}
    for axis, values in axes.items():
        repeated = [values[i % len(values)] for i in range(count)]
        columns[axis] = [repeated[i] for i in rng.permutation(count)]
    return [{axis: column[i] for axis, column in columns.items()} for i in range(count)]
