"""What compiled code can't look into, as ops: signs that hold numbers, and recordings."""

from collections.abc import Callable

import torch
from torch import Tensor

from proxyattn.hf._recording import record_dense

#: Sparse attention by registered name: (q, k, v, sequences, scale, layer) to the output.
runners: dict[str, Callable[..., Tensor]] = {}

_NO_LAYER = -1


def _layer(number: int) -> int | None:
    return None if number == _NO_LAYER else number


def run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Tensor | None,
    scale: float | None,
    layer: int | None,
) -> Tensor:
    """Calls the runner of that name, from compiled code."""
    layer = _NO_LAYER if layer is None else layer
    return torch.ops.proxyattn_hf.run(q, k, v, sequences, scale, layer, name)


def noting_dense(query: Tensor, layer: int | None, reason: str) -> Tensor:
    """Records a dense call from compiled code. Returns the query, which the call must use: an op
    without a user would be left out."""
    layer = _NO_LAYER if layer is None else layer
    return torch.ops.proxyattn_hf.note_dense(query, layer, reason)


# Reading numbers waits for the device, which a CUDA graph can't hold.
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
_TAGS = (torch.Tag.pt2_compliant_tag, *([] if _UNSAFE is None else [_UNSAFE]))

torch.library.define(
    "proxyattn_hf::run",
    "(Tensor q, Tensor k, Tensor v, Tensor? sequences, float? scale, int layer, str name) "
    "-> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "proxyattn_hf::note_dense", "(Tensor query, int layer, str reason) -> Tensor", tags=_TAGS
)


@torch.library.impl("proxyattn_hf::run", ("CPU", "CUDA"))
def _(q, k, v, sequences, scale, layer, name):
    return runners[name](q, k, v, sequences, scale, _layer(layer)).contiguous()


@torch.library.register_fake("proxyattn_hf::run")
def _(q, k, v, sequences, scale, layer, name):
    return q.new_empty(q.shape)


@torch.library.impl("proxyattn_hf::note_dense", ("CPU", "CUDA"))
def _(query, layer, reason):
    record_dense(_layer(layer), reason)
    return query.clone()


@torch.library.register_fake("proxyattn_hf::note_dense")
def _(query, layer, reason):
    return torch.empty_like(query)


torch.library.register_autograd("proxyattn_hf::note_dense", lambda ctx, grad: (grad, None, None))
