"""The main job on a real model: loss and prefill time, dense and sparse, and blocks read."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import proxyattn
from proxyattn._measure import Stopwatch
from proxyattn._report import milliseconds, percent, table
from proxyattn._stages import Settings

LOSS_CHUNK = 1024  # tokens whose logits are held at a time


class ModelError(Exception):
    """The model or the text can't be used, in one sentence."""


@dataclass(frozen=True)
class ModelResult:
    length: int
    device: torch.device
    dtype: torch.dtype
    settings: Settings
    losses: dict[str, float]  # nats per token, by attention
    times: dict[str, float]  # milliseconds of prefill, by attention
    layers: list  # proxyattn.hf.SparseCall
    dense_reasons: dict  # calls that went to SDPA, by (layer, reason)


def run_model(
    model_dir: Path,
    text_file: Path,
    length: int,
    dtype: torch.dtype | None,
    device: torch.device,
    settings: Settings,
    repeats: int,
) -> ModelResult:
    """Reads up to ``length`` tokens of the text with dense and with sparse attention."""
    model, ids = _load(model_dir, text_file, length, dtype, device)
    from proxyattn import hf  # after _load, which says when transformers is missing

    hf.register("proxyattn", min_seqlen=1, **asdict(settings))
    losses, watch = {}, Stopwatch(device)
    with tqdm(total=2 * (repeats + 1) + 1, desc="prefill", leave=False, disable=None) as progress:
        for name, implementation in (("dense", "sdpa"), ("sparse", "proxyattn")):
            model.set_attn_implementation(implementation)
            losses[name] = _loss(model, ids)  # the warm-up too
            progress.update(1)
            for _ in range(repeats):
                with torch.no_grad(), watch(name):
                    model.base_model(ids, use_cache=False)
                progress.update(1)
        with hf.record() as recording, torch.no_grad():
            model.base_model(ids, use_cache=False)
        progress.update(1)
    return ModelResult(
        length=ids.shape[1],
        device=device,
        dtype=model.dtype,
        settings=settings,
        losses=losses,
        times=watch.medians(),
        layers=recording.sparse,
        dense_reasons=dict(recording.dense),
    )


def _load(
    model_dir: Path,
    text_file: Path,
    length: int,
    dtype: torch.dtype | None,
    device: torch.device,
) -> tuple[torch.nn.Module, Tensor]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(
            "--model needs transformers; install it with: pip install 'transformers>=5.0'"
        ) from error
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"--model must be a folder that holds config.json, got {model_dir}")
    try:
        text = text_file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ModelError(f"--text can't be read: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype or "auto", local_files_only=True
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"--model {model_dir} can't be loaded: {first_line}") from error
    limit = getattr(model.config, "max_position_embeddings", None) or length
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = tokens[: min(length, limit)]
    if len(tokens) < 2:
        raise ModelError(f"--text must hold at least 2 tokens, got {len(tokens)} in {text_file}")
    return model.eval().to(device), torch.tensor([tokens], device=device)


@torch.no_grad()
def _loss(model: torch.nn.Module, ids: Tensor) -> float:
    """Mean cross-entropy of the next token, in nats; logits are made a chunk at a time."""
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[0, :-1]
    head = model.get_output_embeddings()
    total = 0.0
    for states, targets in zip(hidden.split(LOSS_CHUNK), ids[0, 1:].split(LOSS_CHUNK), strict=True):
        logits = head(states).float()
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total / (ids.shape[1] - 1)


def model_report(result: ModelResult) -> str:
    """The result as text."""
    on_gpu = result.device.type == "cuda"
    device = torch.cuda.get_device_name(result.device) if on_gpu else "CPU"
    settings = result.settings
    header = (
        f"proxyattn {proxyattn.__version__}, torch {torch.__version__}, {device}\n"
        f"prompt    {result.length} tokens, {str(result.dtype).removeprefix('torch.')}\n"
        f"settings  gamma {settings.gamma:g}, {settings.budget_mode}, stride {settings.stride}, "
        f"block_size {settings.block_size}, min_budget {settings.resolved_min_budget} tokens"
    )
    rows = []
    for call in result.layers:
        by_head = call.share_by_head
        rows.append(
            (
                str(call.layer),
                percent(call.share),
                percent(float(by_head.min())),
                percent(float(by_head.max())),
            )
        )
    rows += [
        (str(layer), f"dense: {reason}", "", "")
        for (layer, reason), _ in result.dense_reasons.items()
    ]
    layers = table(("layer", "blocks read", "least head", "most head"), rows)
    attentions = table(
        ("attention", "loss", "prefill ms"),
        [
            (name, f"{result.losses[name]:.4f}", milliseconds(result.times[name]))
            for name in result.losses
        ],
    )
    speed_up = f"speed-up  {result.times['dense'] / result.times['sparse']:.2f}x of the prefill"
    return "\n\n".join([header, layers, attentions, speed_up])
