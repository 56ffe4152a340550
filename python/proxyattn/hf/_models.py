"""What is refused: models whose attention the hook can't stand in for, and arguments it doesn't
know. Both would be wrong without a word."""

import sys
from collections.abc import Iterator
from functools import cache

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

_OLDEST_TRANSFORMERS = (5, 14)


def require_transformers() -> None:
    """Raises ImportError for a version whose mask functions are not told where queries stand."""
    version = transformers.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, _OLDEST_TRANSFORMERS))
        raise ImportError(
            f"proxyattn.hf needs transformers {oldest} or later, found {version}; "
            f"install it with: pip install 'transformers>={oldest}'"
        )


# ---- by model class


def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError, which says why, if the model's class can't use the hook.

    transformers itself does not ask: some such models would ignore the hook, others would take its
    masks without its attention.
    """
    refusal = refusal_of_class(type(model))
    if refusal is not None:
        raise ValueError(refusal)


def refusal_of_class(cls: type[PreTrainedModel]) -> str | None:
    """Why a model class can't use the hook, None if it can."""
    if not (cls._can_set_attn_implementation() or _has_interface(cls)):
        problem = (
            "has attention code of its own, which never calls transformers' attention interface"
        )
    elif not (cls._supports_sdpa or cls._supports_attention_backend):
        problem = (
            "supports neither SDPA, which runs what is not sparse, nor other attention backends"
        )
    else:
        return None
    return f"proxyattn: {cls.__name__} {problem}; use attn_implementation='eager' for this model"


def _has_interface(cls: type[PreTrainedModel]) -> bool:
    """Whether the module of the class looks attention functions up, in whatever way; transformers
    knows its own way alone, and models outside it are written for older ones."""
    return hasattr(sys.modules.get(cls.__module__), "ALL_ATTENTION_FUNCTIONS")


@torch.compiler.assume_constant_result
def refusal_of_config(config_class: type) -> str | None:
    """Why no model class of this configuration can use the hook, None if one can.

    A mask function is told the configuration, not the model.
    """
    return _refusal_of_config(config_class)


@cache
def _refusal_of_config(config_class: type) -> str | None:
    refusals = [refusal_of_class(cls) for cls in _model_classes(config_class)]
    return refusals[0] if refusals and None not in refusals else None


def _model_classes(config_class: type) -> Iterator[type[PreTrainedModel]]:
    """Those of the modules beside the configuration's; the model that asks has loaded them."""
    package = config_class.__module__.rpartition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package}.modeling_"):
            for value in vars(module).values():
                if (
                    isinstance(value, type)
                    and issubclass(value, PreTrainedModel)
                    and value.config_class is config_class
                ):
                    yield value


# ---- by argument

_REFUSED = {"softcap": "capped scores (softcap)"}
# What SDPA's function acts on.
_FOR_SDPA = frozenset(("position_bias", "output_attentions"))
# What says nothing that the tensors and the mask don't say: set for other implementations, or on
# the way to other parts of the model.
_HARMLESS = frozenset(
    (
        "sliding_window",
        "position_ids",
        "cache_position",
        "use_cache",
        "deterministic",
        "return_dict",
        "output_hidden_states",
        "output_router_logits",
        "logits_to_keep",
        "token_type_ids",
        "num_items_in_batch",
        "shift_labels",
        "ignore_index",
        "seq_idx",
    )
)
_PACKED = frozenset(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))


def refuse_arguments(kwargs: dict, is_masked: bool) -> None:
    """Raises ValueError for an argument that would be left out without a word.

    Args:
        kwargs: what a model gave to attention beyond the arguments that all give.
        is_masked: whether a mask came along, one that can keep packed sequences apart.
    """
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS or name in _FOR_SDPA:
            continue
        if name in _PACKED:
            if is_masked or not _holds_several(kwargs.get("cu_seq_lens_q")):
                continue
            what = f"packed sequences ({name}) without a mask"
        else:
            what = _REFUSED.get(name, f"the argument {name}")
        raise ValueError(
            f"proxyattn: attention with {what} is not supported, and neither is it by SDPA; use "
            "attn_implementation='eager' for this model"
        )


def _holds_several(boundaries: Tensor | None) -> bool:
    return boundaries is not None and boundaries.numel() > 2
