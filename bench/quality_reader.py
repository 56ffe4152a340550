"""A model that reads prompts with any selector in its attention, and what it then loses."""

import math
from dataclasses import dataclass
from pathlib import Path

import proxyattn
import torch
import transformers
from quality_prompts import STYLES, Prompt
from quality_selectors import Dense
from torch import Tensor
from torch.nn import functional

LOGITS_CHUNK = 512  # positions whose logits exist at a time: half a GB for 262144 words


@dataclass
class Reading:
    """What reading prompts came to."""

    loss: float  # nats per token of the text before the questions
    right: list[bool]  # by question
    read: float  # key blocks read of those that causal attention sees


class _Attention:
    """The attention of all layers: windows exactly, the rest over the blocks that are chosen."""

    def __init__(self):
        self.selector = Dense()
        self.read = 0  # key blocks, over heads, query blocks and layers; on the device
        self.visible = 0

    def __call__(self, module, query, key, value, mask, dropout=0.0, scaling=None, **kwargs):
        """``query [1, Hq, N, D]``, ``key, value [1, Hkv, N, D]`` to ``[1, N, Hq, D]`` and None."""
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        window = kwargs.get("sliding_window")
        if window is not None and window < query.shape[2]:
            return window_attention(query, key, value, window, scale).transpose(1, 2), None
        if isinstance(self.selector, Dense):
            key, value = _repeat(query, key, value)
            out = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale
            )
            return out.transpose(1, 2), None
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        indices, counts, block_size = self.selector.choose(q, k, scale)
        num_blocks = counts.shape[2]
        self.read = self.read + counts.sum()
        self.visible += counts.shape[1] * num_blocks * (num_blocks + 1) // 2
        out, _ = proxyattn.block_sparse_attention(q, k, v, indices, counts, block_size, scale=scale)
        return out, None


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float
) -> Tensor:
    """Causal attention to the last ``window`` keys, as batches that see two windows each.

    Args:
        query: ``[1, Hq, N, D]``.
        key, value: ``[1, Hkv, N, D]``.

    Returns:
        ``[1, Hq, N, D]``.
    """
    key, value = _repeat(query, key, value)
    length, padding = query.shape[2], -query.shape[2] % window

    def windows(x: Tensor, before: int) -> Tensor:
        """``[ceil(N / window), heads, window, D]``, with ``before`` windows of zeros in front."""
        padded = functional.pad(x[0], (0, 0, before * window, padding))
        return padded.unflatten(1, (-1, window)).transpose(0, 1)

    queries = windows(query, 0)
    keys, values = (
        torch.cat((both[:-1], both[1:]), dim=2) for both in (windows(key, 1), windows(value, 1))
    )
    rows = torch.arange(window, 2 * window, device=query.device)[:, None]
    columns = torch.arange(2 * window, device=query.device)
    seen = ((columns <= rows) & (columns > rows - window)).repeat(len(queries), 1, 1, 1)
    seen[0, ..., :window] = False  # the zeros in front
    out = functional.scaled_dot_product_attention(queries, keys, values, seen, scale=scale)
    return out.transpose(0, 1).flatten(1, 2)[None, :, :length]


def _repeat(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Keys and values once for each query head, for which torch has kernels in every case."""
    group = query.shape[1] // key.shape[1]
    return [x.repeat_interleave(group, dim=1) for x in (key, value)]


class Reader:
    """A causal model of a Hugging Face folder.

    Args:
        folder: its path; the last part names the model.
        style: of the prompts made for it.
        device: bf16 is used on GPUs, fp32 on CPUs.

    Raises:
        ValueError: for a model whose logits are not its output embedding of the last states.
    """

    def __init__(self, folder: Path, style: str, device: torch.device):
        self.name, self.style, self.device = folder.name, STYLES[style], device
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval()
        self.attention = _Attention()
        implementation = f"quality {self.name}"
        transformers.AttentionInterface.register(implementation, self.attention)
        # All prompts are whole and causal, which the attention above knows without a mask.
        transformers.AttentionMaskInterface.register(implementation, lambda **arguments: None)
        self.model.set_attn_implementation(implementation)
        self._check_logits()

    @property
    def heads(self) -> tuple[int, int]:
        """Query and kv heads."""
        config = self.model.config.get_text_config()
        return config.num_attention_heads, config.num_key_value_heads

    @torch.inference_mode()
    def read(self, prompts: list[Prompt], selector, loss_tokens: int) -> Reading:
        """Reads each prompt with the selector; the loss is over the last tokens of its text."""
        attention = self.attention
        attention.selector, attention.read, attention.visible = selector, 0, 0
        losses, right = [], []
        for prompt in prompts:
            ids = prompt.ids.to(self.device)
            first = max(1, prompt.text_end - loss_tokens)
            nats, known = self._predictions(ids, first)
            losses.append(nats[: prompt.text_end - first].mean())
            known = known.tolist()
            right += [all(known[position - first] for position in span) for span in prompt.answers]
        read = float(attention.read) / attention.visible if attention.visible else 1.0
        return Reading(float(torch.stack(losses).mean()), right, read)

    def _predictions(self, ids: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """For the tokens from ``first`` on: nats that each costs, and if it is the likeliest."""
        states = self.model.base_model(ids[None], use_cache=False).last_hidden_state[0]
        nats, known = [], []
        for before, targets in zip(
            states[first - 1 : -1].split(LOGITS_CHUNK), ids[first:].split(LOGITS_CHUNK), strict=True
        ):
            logits = self.model.get_output_embeddings()(before).float()
            nats.append(functional.cross_entropy(logits, targets, reduction="none"))
            known.append(logits.argmax(-1) == targets)
        return torch.cat(nats), torch.cat(known)

    @torch.inference_mode()
    def _check_logits(self) -> None:
        ids = torch.arange(8, device=self.device)[None]
        states = self.model.base_model(ids, use_cache=False).last_hidden_state
        if not torch.equal(
            self.model.get_output_embeddings()(states), self.model(ids, use_cache=False).logits
        ):
            raise ValueError(
                "quality: logits must be the output embedding of the last states, got "
                f"{type(self.model).__name__}, which changes them"
            )
