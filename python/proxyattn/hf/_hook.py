"""The two functions that transformers calls: one makes masks, one attends."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from proxyattn._config import can_run
from proxyattn._stages import Settings
from proxyattn.hf import _ops
from proxyattn.hf._attend import attend, attend_packed
from proxyattn.hf._causal import Causal, causal_sign, dense_mask, read_sign
from proxyattn.hf._models import refusal_of_config, refuse_arguments
from proxyattn.hf._notices import warn_dense, warn_proxy_heads
from proxyattn.hf._ops import Rule
from proxyattn.hf._packed import packing_of
from proxyattn.hf._recording import anything_recorded, record_dense
from proxyattn.hf._sinks import attend_with_sinks, sinks_of

#: Calls that see fewer tokens than this go to SDPA, by device type: from here on the least budgets
#: of both modes leave blocks out, and sparse prefill is faster. See bench/RESULTS.md.
MIN_SEQLEN = {"cpu": 4096, "cuda": 4096}
#: And so do calls of fewer queries, however long the prefix: what each head needs is estimated from
#: as many.
MIN_QUERIES = 64


def register(name: str = "proxyattn", *, min_seqlen: int | None = None, **settings) -> None:
    """Makes sparse prefill available as ``attn_implementation=name``.

    Calling it again with the same name changes the settings of models that already use it.

    Args:
        name: the name to use in ``from_pretrained(..., attn_implementation=name)`` or
            ``model.set_attn_implementation(name)``.
        min_seqlen: tokens that a forward pass must see to run sparse, cached ones included; shorter
            ones cost less with SDPA. None means ``MIN_SEQLEN`` of the device. Passes of fewer than
            ``MIN_QUERIES`` new tokens never run sparse, unless ``min_seqlen`` is less than that.
        settings: those of :func:`proxyattn.proxy_attention`, with its defaults. Where
            ``num_proxy_heads`` doesn't fit a layer, the nearest number that does is used.

    Raises:
        TypeError: for a setting that doesn't exist.
        ValueError: for a value that no model could use.
    """
    if min_seqlen is not None and min_seqlen < 1:
        raise ValueError(f"register: min_seqlen must be at least 1, got min_seqlen={min_seqlen}")
    hook = _Hook(name, Settings(**settings), min_seqlen)
    hook.settings.check()
    _ops.runners[name] = hook.run
    AttentionInterface.register(name, hook.attention)
    AttentionMaskInterface.register(name, hook.mask)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as SDPA would read them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


@dataclass(frozen=True)
class _Hook:
    name: str
    settings: Settings
    min_seqlen: int | None

    def is_short(self, q_len: int, kv_len: int, device: torch.device) -> bool:
        default = MIN_SEQLEN.get(device.type, MIN_SEQLEN["cuda"])
        least = default if self.min_seqlen is None else self.min_seqlen
        return kv_len < least or q_len < min(MIN_QUERIES, least)

    # ---- masks

    def mask(self, **arguments) -> Tensor | None:
        """SDPA's mask; for causal prompts a sign that takes no memory, see ``_causal.py``."""
        if arguments.get("config") is not None:
            refusal = refusal_of_config(type(arguments["config"]))
            if refusal is not None:
                raise ValueError(refusal)
        sign = causal_sign(**arguments)
        return sdpa_mask(**arguments) if sign is None else sign

    # ---- attention

    def attention(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """``query [B, Hq, M, D]``, ``key, value [B, Hkv, N, D]`` to ``[B, M, Hq, D]`` and None."""
        causal = read_sign(attention_mask)
        is_masked = causal is None and attention_mask is not None
        sinks = sinks_of(kwargs, query)
        refuse_arguments(kwargs, is_masked)
        if causal is not None:
            _check_lengths(causal, query, key)
        seen = key.shape[2] if causal is None else causal.seen
        window = None if causal is None else causal.window
        sees_later = not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        q, k, v = _autocast(query, key, value)
        reason = (
            _unsupported_argument(kwargs, seen if window is None and not is_masked else 0)
            or ("short" if self.is_short(query.shape[2], seen, query.device) else None)
            or _unsupported_mask(causal, is_masked, sees_later, query, key)
            or _unsupported_mode(module, dropout, query, key, value, sinks)
            or _unsupported_tensors(q, k, v)
        )
        layer = getattr(module, "layer_idx", None)
        if reason is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            self._fitted(q, k, module)
            sequences = None if causal is None else causal.sequences
            if sequences is None:
                k, v = k[:, :seen], v[:, :seen]
            rule = Rule(scaling, window, None if sinks is None else sinks.float())
            return self._run(q, k, v, sequences, rule, layer), None
        if reason != "short":
            warn_dense(module, reason, query)
        if not torch.compiler.is_compiling():
            record_dense(layer, reason)
        elif anything_recorded():
            query = _ops.note_dense(query, layer, reason)
        if causal is not None:
            attention_mask = dense_mask(causal, query.shape[2], query.device)
        if sinks is not None:
            return attend_with_sinks(
                query, key, value, attention_mask, sinks, not sees_later, scaling, dropout
            ), None
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: Tensor | None,
        rule: Rule,
        layer: int | None,
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.run(q, k, v, sequences, rule, layer)
        if sequences is not None or anything_recorded():
            return _ops.run(q, k, v, sequences, *rule, layer, self.name)
        return self._settings(q, k, rule).attend(q, k, v, *rule)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: Tensor | None,
        rule: Rule,
        layer: int | None,
    ) -> Tensor:
        """Attention of all sequences, recorded where recordings are open."""
        if rule.window is not None:
            record_dense(layer, "window")
        settings = self._settings(q, k, rule)
        if sequences is None:
            return attend(q, k, v, settings, rule, layer)
        packing = packing_of(sequences, *q.shape[:2])
        return attend_packed(q, k, v, packing, settings, rule, layer)

    def _settings(self, q: Tensor, k: Tensor, rule: Rule) -> Settings:
        """Those of a call; a window leaves few enough blocks to read them all."""
        settings = self._fitted(q, k)
        return settings if rule.window is None else replace(settings, gamma=1.0)

    def _fitted(self, q: Tensor, k: Tensor, module: torch.nn.Module | None = None) -> Settings:
        """The settings with a number of proxy heads that the layer can have."""
        q_heads, kv_heads = q.shape[2], k.shape[2]
        fitted = self.settings.fit(q_heads, kv_heads)
        if fitted is not self.settings and module is not None:
            wanted, used = self.settings.num_proxy_heads, fitted.num_proxy_heads
            warn_proxy_heads(module, wanted, used, q_heads, kv_heads)
        return fitted


def _check_lengths(causal: Causal, query: Tensor, key: Tensor) -> None:
    """SDPA would raise for a mask of other sizes; a sign would be taken for something it isn't."""
    for name, tensor, length in (("query", query, causal.q_len), ("key", key, causal.kv_len)):
        if length is not None and tensor.shape[2] != length:
            raise ValueError(
                f"proxyattn: {name} must have the {length} tokens that the mask was made for, got "
                f"{tensor.shape[2]}; caches whose layers hold different lengths are not supported"
            )


# ---- why a call needs SDPA, in a few words; None if this doesn't


def _unsupported_argument(kwargs: dict, seen: int) -> str | None:
    if kwargs.get("position_bias") is not None:
        return "position_bias"
    if kwargs.get("output_attentions"):
        return "output_attentions"
    window = kwargs.get("sliding_window")
    if window is not None and window < seen:
        return "sliding_window"
    return None


def _unsupported_mask(
    causal: Causal | None, is_masked: bool, sees_later: bool, query: Tensor, key: Tensor
) -> str | None:
    if is_masked:
        return "mask"
    if sees_later:
        return "not causal"
    if causal is None and query.shape[2] != key.shape[2]:
        return "cache"  # SDPA aligns such a call top-left
    return None


def _unsupported_mode(
    module: torch.nn.Module, dropout: float, *tensors: Tensor | None
) -> str | None:
    if module.training:
        return "training"
    if dropout > 0:
        return "dropout"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return "gradient"
    return None


def _unsupported_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    head_dim = query.shape[3]
    if key.shape[3] != head_dim or value.shape[3] != head_dim:
        return "head_dim"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return "dtype"
    if not can_run(query.device, head_dim, query.dtype):
        return "no kernel"
    if any(x.stride(3) != 1 for x in (query, key, value)):
        return "layout"
    return None
