"""Sparse prefill inside Hugging Face transformers.

    import proxyattn.hf

    proxyattn.hf.register(gamma=0.95)
    model.set_attn_implementation("proxyattn")

Long causal prompts then run sparse attention; everything else (decoding, short prompts, padded
batches, sliding-window layers, training) runs transformers' own SDPA attention. :func:`record`
shows what ran where.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from proxyattn._config import supported_configs
from proxyattn._stages import Settings, run_stages, visible_blocks

#: Prompts with fewer new tokens than this go to SDPA, by device type: from here on the least
#: budgets of both modes leave blocks out, and sparse prefill is faster. See bench/RESULTS.md.
MIN_SEQLEN = {"cpu": 4096, "cuda": 4096}

# Arguments that change what attention computes, and that the sparse kernels know nothing of.
_UNSUPPORTED_ARGUMENTS = ("sliding_window", "position_bias", "output_attentions")
_REFUSED_ARGUMENTS = {"s_aux": "learned sinks (s_aux)", "softcap": "capped scores (softcap)"}


def register(
    name: str = "proxyattn",
    *,
    gamma: float = Settings.gamma,
    budget_mode: str = Settings.budget_mode,
    stride: int = Settings.stride,
    block_size: int = Settings.block_size,
    num_proxy_heads: int | None = Settings.num_proxy_heads,
    min_budget: int | None = Settings.min_budget,
    num_sink_blocks: int = Settings.num_sink_blocks,
    num_local_blocks: int = Settings.num_local_blocks,
    min_seqlen: int | None = None,
) -> None:
    """Makes sparse prefill available as ``attn_implementation=name``.

    Calling it again with the same name changes the settings of models that already use it.

    Args:
        name: the name to use in ``from_pretrained(..., attn_implementation=name)`` or
            ``model.set_attn_implementation(name)``.
        gamma: as in :func:`proxyattn.proxy_attention`, like all that follow but the last.
        budget_mode: ``"last_block"`` or ``"coverage"``.
        stride: 1, 2, 4 or 8.
        block_size: 64 or 128 tokens.
        num_proxy_heads: rankings per layer; must divide the model's kv heads, None means all.
        min_budget: tokens that every head takes at least.
        num_sink_blocks: first key blocks that are always taken.
        num_local_blocks: latest key blocks that are always taken.
        min_seqlen: new tokens that a forward pass must have to run sparse; shorter ones cost less
            with SDPA. None means ``MIN_SEQLEN`` of the device.

    Raises:
        ValueError: for a value that no model could use.
    """
    if min_seqlen is not None and min_seqlen < 1:
        raise ValueError(f"register: min_seqlen must be at least 1, got min_seqlen={min_seqlen}")
    settings = Settings(
        gamma=gamma,
        budget_mode=budget_mode,
        stride=stride,
        block_size=block_size,
        num_proxy_heads=num_proxy_heads,
        min_budget=min_budget,
        num_sink_blocks=num_sink_blocks,
        num_local_blocks=num_local_blocks,
    )
    settings.check()
    hook = _Hook(settings, min_seqlen)
    AttentionInterface.register(name, hook.attention)
    AttentionMaskInterface.register(name, hook.mask)


# ---- recording


@dataclass(frozen=True)
class SparseCall:
    """One layer's sparse attention in one forward pass."""

    layer: int | None
    q_len: int
    kv_len: int
    block_size: int
    counts: Tensor  # int32 [B, Hq, ceil(q_len / block_size)], key blocks read

    @property
    def blocks_read(self) -> int:
        """Key blocks read, over all batch entries, heads and query blocks."""
        return int(self.counts.sum())

    @property
    def blocks_visible(self) -> int:
        """Key blocks that dense causal attention would have read."""
        batch, heads, _ = self.counts.shape
        return batch * heads * int(visible_blocks(self.q_len, self.kv_len, self.block_size).sum())

    @property
    def share(self) -> float:
        """Blocks read of those visible, between 0 and 1."""
        return self.blocks_read / max(1, self.blocks_visible)

    @property
    def share_by_head(self) -> Tensor:
        """The same for each query head, float64 ``[Hq]``."""
        visible = visible_blocks(self.q_len, self.kv_len, self.block_size).sum()
        batch = max(1, self.counts.shape[0])
        return self.counts.sum(dim=(0, 2), dtype=torch.float64).cpu() / (batch * visible)


@dataclass
class Recording:
    """What ran inside a :func:`record` block."""

    sparse: list[SparseCall] = field(default_factory=list)
    #: Calls that went to SDPA: how many, by (layer, reason).
    dense: Counter = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Blocks read by the sparse calls of those visible to them, between 0 and 1."""
        visible = sum(call.blocks_visible for call in self.sparse)
        return sum(call.blocks_read for call in self.sparse) / max(1, visible)


_recordings: list[Recording] = []


@contextmanager
def record() -> Iterator[Recording]:
    """Collects which blocks each layer reads, and which calls went to SDPA and why.

    While recording, the stages run one by one instead of in one call, so that the counts can be
    seen: results are the same but for rounding, times are not.
    """
    recording = Recording()
    _recordings.append(recording)
    try:
        yield recording
    finally:
        _recordings.remove(recording)


# ---- the two functions that transformers calls


_KERNELS = frozenset(
    (config["device"], config["head_dim"], getattr(torch, config["dtype"]))
    for config in supported_configs()
)
_LEAST_CAPABILITY = (8, 0)


def _can_run(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False
    return (device.type, head_dim, dtype) in _KERNELS


def _is_plain_causal(mask: Tensor | None) -> bool:
    """True for the sign that `_Hook.mask` sends in place of a mask."""
    return mask is not None and mask.dim() == 4 and mask.shape[0] == 0


@dataclass(frozen=True)
class _Hook:
    settings: Settings
    min_seqlen: int | None

    def is_short(self, q_len: int, device: torch.device) -> bool:
        default = MIN_SEQLEN.get(device.type, MIN_SEQLEN["cuda"])
        return q_len < (default if self.min_seqlen is None else self.min_seqlen)

    def mask(self, **arguments) -> Tensor | None:
        """SDPA's mask; for a long, plain causal prompt a sign that takes no memory.

        The sign is an empty mask, of batch size 0: its last two sizes are the query tokens and the
        tokens seen so far, to which the causal mask is aligned bottom-right. Behind them a static
        cache may have room for more.
        """
        seen = self._plain_causal_len(**arguments)
        if seen is None:
            return sdpa_mask(**arguments)
        shape = (0, 1, arguments["q_length"], seen)
        return torch.empty(shape, dtype=torch.bool, device=arguments.get("device", "cpu"))

    def _plain_causal_len(
        self,
        *,
        q_length: int | None = None,
        kv_length: int | None = None,
        q_offset: int | Tensor | None = None,
        kv_offset: int = 0,
        mask_function=None,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        device: torch.device | str = "cpu",
        **others,
    ) -> int | None:
        """Tokens seen up to the last query, or None if the mask is not plain causal or is short."""
        if q_length is None or kv_length is None or q_offset is None or kv_offset != 0:
            return None
        if mask_function is not causal_mask_function or local_size is not None:
            return None
        if not allow_is_causal_skip or self.is_short(q_length, torch.device(device)):
            return None
        reads_values = attention_mask is not None or isinstance(q_offset, Tensor)
        if reads_values and torch.compiler.is_compiling():
            return None
        seen = int(q_offset) + q_length
        if attention_mask is not None:
            real = attention_mask[:, :seen]
            if real.shape[1] < seen or not bool(real.all()):
                return None
        return seen if seen <= kv_length else None

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
        for name, what in _REFUSED_ARGUMENTS.items():
            # SDPA, in some versions, would leave it out without a word.
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"proxyattn: attention with {what} is not supported, and neither is it by "
                    "SDPA; use attn_implementation='eager' for this model"
                )
        if _is_plain_causal(attention_mask):
            seen = attention_mask.shape[3]
            key, value = key[:, :, :seen], value[:, :, :seen]
        reason = self._why_dense(
            module, query, key, value, attention_mask, dropout, is_causal, kwargs
        )
        if reason is not None:
            for recording in _recordings:
                recording.dense[getattr(module, "layer_idx", None), reason] += 1
            if _is_plain_causal(attention_mask):
                attention_mask, is_causal = _dense_mask(attention_mask), True
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
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if not _recordings:
            return self.settings.attend(q, k, v, scaling), None
        stages = run_stages(q, k, v, self.settings, scaling)
        call = SparseCall(
            getattr(module, "layer_idx", None),
            q.shape[1],
            k.shape[1],
            self.settings.block_size,
            stages.counts,
        )
        for recording in _recordings:
            recording.sparse.append(call)
        return stages.out, None

    def _why_dense(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float,
        is_causal: bool | None,
        kwargs: dict,
    ) -> str | None:
        """Why this call needs SDPA, in a few words; None if it can run sparse."""
        for name in _UNSUPPORTED_ARGUMENTS:
            given = kwargs.get(name)
            if given is not None and given is not False:
                return name
        if self.is_short(query.shape[2], query.device):
            return "short"
        if not _is_plain_causal(attention_mask):
            if attention_mask is not None:
                return "mask"
            if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
                return "not causal"
            if query.shape[2] != key.shape[2]:
                return "cache"  # SDPA aligns such a call top-left
        if dropout > 0:
            return "dropout"
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            return "gradient"
        head_dim = query.shape[3]
        if key.shape[3] != head_dim or value.shape[3] != head_dim:
            return "head_dim"
        if key.dtype != query.dtype or value.dtype != query.dtype:
            return "dtype"
        if not _can_run(query.device, head_dim, query.dtype):
            return "no kernel"
        if any(x.stride(3) != 1 for x in (query, key, value)):
            return "layout"
        return None


def _dense_mask(plain_causal: Tensor) -> Tensor | None:
    """What SDPA needs for a plain causal call: nothing, or the mask after a prefix."""
    _, _, q_len, seen = plain_causal.shape
    if q_len == seen:
        return None
    ones = torch.ones(q_len, seen, dtype=torch.bool, device=plain_causal.device)
    return ones.tril(seen - q_len)[None, None]
