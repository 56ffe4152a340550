"""One logged line per model and cause."""

import logging
import weakref

import torch
from torch import Tensor

_logger = logging.getLogger("proxyattn")

# What has been said, by the id of the model's configuration, for as long as that lives.
_said: dict[int, set[str]] = {}

# What would make a call sparse, by the reason that it isn't.
_REMEDIES = {
    "position_bias": "attention with position biases always runs dense",
    "output_attentions": "leave output_attentions off",
    "sliding_window": "a window that the layer has and its mask has not is left to SDPA",
    "mask": "masks other than causal ones, of packed sequences for example, always run dense; "
    "padding is fine",
    "not causal": "attention that is not causal always runs dense",
    "cache": "fewer queries than keys need a mask that transformers' mask functions made",
    "training": "there is no backward; call model.eval() and use torch.no_grad()",
    "gradient": "there is no backward; use torch.no_grad() or torch.inference_mode(), since "
    "parameters that require gradients, adapters among them, make attention require them too",
    "dropout": "leave dropout off",
    "head_dim": "queries, keys and values must have one head_dim",
    "dtype": "queries, keys and values must have one dtype; torch.autocast makes it so",
    "no kernel": "this build has no kernel for head_dim {head_dim} in {dtype} on {device}; "
    "proxyattn.show_config() lists those that it has",
    "layout": "the last dimension of queries, keys and values must be contiguous",
}


def warn_dense(module: torch.nn.Module, reason: str, query: Tensor) -> None:
    """Says that a long prompt runs dense, and what would make it sparse."""
    _say(
        _model_id(module),
        reason,
        f"proxyattn: a long prompt runs dense in {_place(module)} ({reason}): "
        + _REMEDIES[reason].format(
            head_dim=query.shape[3], dtype=query.dtype, device=query.device.type
        ),
    )


def warn_proxy_heads(
    module: torch.nn.Module, wanted: int, used: int, q_heads: int, kv_heads: int
) -> None:
    """Says that a number of proxy heads had to be changed."""
    _say(
        _model_id(module),
        "num_proxy_heads",
        f"proxyattn: num_proxy_heads={wanted} fits no layer of {q_heads} query and {kv_heads} kv "
        f"heads, as {_place(module)} is; it uses {used}",
    )


def _place(module: torch.nn.Module) -> str:
    return f"{type(module).__name__}, layer {getattr(module, 'layer_idx', None)}"


def _model_id(module: torch.nn.Module) -> int:
    model = getattr(module, "config", module)
    # Compiled code has ids of objects, but no way to wait for their end.
    if not torch.compiler.is_compiling() and id(model) not in _said:
        _said[id(model)] = set()
        weakref.finalize(model, _said.pop, id(model), None)
    return id(model)


@torch.compiler.assume_constant_result
def _say(model: int, cause: str, text: str) -> None:
    causes = _said.setdefault(model, set())
    if cause not in causes:
        causes.add(cause)
        _logger.warning(text)
