"""A model and a prompt from files, and what the model makes of the prompt with some attention."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from proxyattn._measure import Stopwatch, kept_mass
from proxyattn._stages import observe

LOSS_CHUNK = 1024  # tokens whose logits are held at a time
MAX_CHARACTERS = 32  # of a token; what lies behind as many tokens of that length is not looked at
KEPT_BLOCKS = 16  # query blocks of a layer whose kept attention is measured


class ModelError(Exception):
    """The model or the text can't be used, in one sentence."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a GPU or of the machine, is what was missing."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # What torch's CPU allocator says has no class of its own.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


@contextmanager
def _as_sentence(what: str, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{what}: {first_line(error)}") from error


@contextmanager
def _forward(module: torch.nn.Module, function: Callable) -> Iterator[None]:
    """Inside the block the module's forward is another function."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@dataclass(frozen=True)
class Reading:
    """A prompt read with one kind of attention."""

    loss: float  # nats per token
    milliseconds: float  # median of the prefill
    layers: list["LayerReading"]  # that ran sparse
    dense: dict  # calls that went to SDPA although sparse was asked for, by (layer, reason)

    @property
    def share(self) -> float:
        """Blocks read of those visible, over the layers that ran sparse."""
        visible = sum(layer.call.blocks_visible for layer in self.layers)
        return sum(layer.call.blocks_read for layer in self.layers) / visible


@dataclass(frozen=True)
class LayerReading:
    """One layer that ran sparse."""

    call: object  # proxyattn.hf.SparseCall
    kept: Tensor  # [Hq], share of exact attention that lies in the blocks read
    kv_heads: int


@dataclass(frozen=True)
class Reader:
    """A model, and the prompt that it reads."""

    model: torch.nn.Module
    ids: Tensor  # int64 [1, N]
    about_model: str
    about_prompt: str

    @property
    def heads(self) -> tuple[int, int]:
        """Query and kv heads of the model's layers, as its configuration says."""
        config = self.model.config.get_text_config()
        q_heads = config.num_attention_heads
        return q_heads, getattr(config, "num_key_value_heads", None) or q_heads

    def dense(self, repeats: int) -> Reading:
        """Reads with torch's attention."""
        self._set_attention("sdpa")
        loss = self._loss()
        return Reading(loss, self._prefill_time(repeats), [], {})

    def sparse(self, name: str, repeats: int) -> Reading:
        """Reads with an attention that :func:`proxyattn.hf.register` knows by this name."""
        from proxyattn import hf

        self._set_attention(name)
        kept, kv_heads = [], []

        def measure(call):
            kept.append(kept_mass(call, KEPT_BLOCKS)[0].cpu())
            kv_heads.append(call.k.shape[2])

        with hf.record() as recording, observe(measure):
            loss = self._loss()
        layers = [
            LayerReading(*layer) for layer in zip(recording.sparse, kept, kv_heads, strict=True)
        ]
        if not layers and not recording.dense:
            raise ModelError(
                f"--model: {self.about_model} has attention code of its own, which never asks for "
                "the attention that is set"
            )
        return Reading(loss, self._prefill_time(repeats), layers, dict(recording.dense))

    def _set_attention(self, name: str) -> None:
        with _as_sentence(f"--model can't use {name}", ValueError, TypeError):
            self.model.set_attn_implementation(name)

    @torch.no_grad()
    def _prefill(self):
        wrong = (ValueError, TypeError, NotImplementedError, RuntimeError)
        with _as_sentence(f"--model: {self.about_model} can't read the prompt", *wrong):
            return self.model.base_model(self.ids, use_cache=False)

    def _prefill_time(self, repeats: int) -> float:
        watch = Stopwatch(self.ids.device)
        for _ in range(repeats):
            with watch("prefill"):
                self._prefill()
        return watch.medians()["prefill"]

    @torch.no_grad()
    def _loss(self) -> float:
        """Mean cross-entropy of the next token, in nats; logits are made a chunk at a time."""
        output = self._prefill()
        hidden = output.last_hidden_state[:, :-1]
        chunks = hidden.split(LOSS_CHUNK, 1), self.ids[0, 1:].split(LOSS_CHUNK)
        total = 0.0
        # The model's own head, with whatever it does to logits, over states that are there already.
        with _forward(self.model.base_model, lambda *_, **__: output):
            for states, targets in zip(*chunks, strict=True):
                output.last_hidden_state = states
                logits = self.model(self.ids[:, : states.shape[1]], use_cache=False).logits[0]
                loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
                total += float(loss)
        return total / (self.ids.shape[1] - 1)


def load(
    model_dir: Path,
    text_file: Path,
    length: int,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Reader:
    """The model, and up to ``length`` tokens of the text; the text is looked at first."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError as error:
        raise ModelError(
            "--model needs transformers; install it with: pip install 'transformers>=5.0'"
        ) from error
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"--model must be a folder that holds config.json, got {model_dir}")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        text = text_file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ModelError(f"--text can't be read: {error}") from error
    # Files of others can fail in any way.
    with _as_sentence(f"--model {model_dir} can't be loaded", Exception):
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        looked_at = text[: length * MAX_CHARACTERS]
        tokens = tokenizer(looked_at, verbose=False)["input_ids"]
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or length
    used = tokens[: min(length, limit)]
    if len(used) < 2:
        raise ModelError(f"--text must hold at least 2 tokens, got {len(used)} in {text_file}")
    with _as_sentence(f"--model {model_dir} can't be loaded", Exception):
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype or "auto", local_files_only=True
        )
        model = model.eval().to(device)
    about_prompt = _about_prompt(len(used), len(tokens), text != looked_at, length, limit)
    return Reader(
        model,
        torch.tensor([used], device=device),
        f"{type(model).__name__} of {model_dir}",
        f"{about_prompt} of {text_file}",
    )


def _about_prompt(used: int, found: int, has_more: bool, length: int, limit: int) -> str:
    if used == found and not has_more:
        return f"all {used} tokens" + (f", fewer than --length {length}," if used < length else "")
    why = f" (the model's limit is {limit})" if limit < length else ""
    return f"the first {used} tokens{why}"
