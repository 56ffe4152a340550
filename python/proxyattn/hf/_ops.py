"""What compiled code can't look into, as ops: signs that hold numbers, and recordings.

They call back into Python, which no op of the extension could do.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from proxyattn.hf._recording import record_dense


class Rule(NamedTuple):
    """What a layer's attention is, beside its tensors."""

    scale: float | None
    window: int | None
    sinks: Tensor | None  # fp32 [Hq]


#: Attention by registered name: (q, k, v, sequences, rule, layer) to the output.
runners: dict[str, Callable[..., Tensor]] = {}

# Reading numbers waits for the device, which a CUDA graph can't hold; older torch has no word for
# it, and leaves out graphs with tensors on the CPU, as sequences are.
_tags = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
_op = partial(torch.library.custom_op, mutates_args=(), **_tags)


@_op("proxyattn_hf::run")
def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Tensor | None,
    scale: float | None,
    window: int | None,
    sinks: Tensor | None,
    layer: int | None,
    name: str,
) -> Tensor:
    """Attention by the runner of that name."""
    return runners[name](q, k, v, sequences, Rule(scale, window, sinks), layer).contiguous()


@run.register_fake
def _(q, k, v, sequences, scale, window, sinks, layer, name):
    return q.new_empty(q.shape)


@_op("proxyattn_hf::note_dense")
def note_dense(query: Tensor, layer: int | None, reason: str) -> Tensor:
    """Records a dense call. Returns the query, which the call must use: an op without a user would
    be left out."""
    record_dense(layer, reason)
    return query.clone()


@note_dense.register_fake
def _(query, layer, reason):
    return torch.empty_like(query)


note_dense.register_autograd(lambda ctx, grad: (grad, None, None))
