"""Which settings suit a model: a sweep over gamma, proxies and stride on a text of the user's."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from proxyattn._model import ModelError, Reader, Reading, load
from proxyattn._model_run import header, layer_table, median
from proxyattn._report import describe, legend, milliseconds, percent, table
from proxyattn.settings import Settings, legal_proxy_heads

NAME = "proxyattn_tune"
SAME_TIME = 1.02  # prefills whose times differ by less than this factor count as equally fast


@dataclass(frozen=True)
class Sweep:
    """The values to try, all with all; no proxies stand for numbers that fit the model."""

    gammas: list[float]
    strides: list[int]
    proxies: list[int] | None

    def settings(self, base: Settings) -> list[Settings]:
        """The base with each combination of the values."""
        return [
            replace(base, gamma=gamma, stride=stride, num_proxy_heads=num_proxy_heads)
            for stride, num_proxy_heads, gamma in product(
                self.strides, self.proxies or [None], self.gammas
            )
        ]


@dataclass(frozen=True)
class Trial:
    """One setting, tried."""

    settings: Settings
    reading: Reading

    @property
    def kept(self) -> Tensor:
        """Kept attention of every layer, mean of its heads."""
        return torch.stack([layer.kept.mean() for layer in self.reading.layers])


@dataclass(frozen=True)
class TuneResult:
    reader: Reader
    base: Settings
    max_loss: float
    dense: Reading
    trials: list[Trial]
    min_seqlen: int  # from which on register() lets layers run sparse

    def loss_over_dense(self, trial: Trial) -> float:
        """Nats per token."""
        return trial.reading.loss - self.dense.loss

    @property
    def best(self) -> Trial | None:
        """The cheapest within the limit: of those as fast as the fastest, what reads least."""
        within = [trial for trial in self.trials if self.loss_over_dense(trial) <= self.max_loss]
        if not within:
            return None
        fastest = min(trial.reading.milliseconds for trial in within)
        equal = [t for t in within if t.reading.milliseconds <= SAME_TIME * fastest]
        return min(equal, key=lambda trial: trial.reading.share)


def tune(
    model_dir: Path,
    text_file: Path,
    length: int,
    dtype: torch.dtype | None,
    device: torch.device,
    base: Settings,
    sweep: Sweep,
    max_loss: float,
    repeats: int,
) -> TuneResult:
    """Reads the text with dense attention, then with every setting of the sweep."""
    reader = load(model_dir, text_file, length, dtype, device)
    from proxyattn import hf  # after load, which says when transformers is missing

    def read(settings: Settings, repeats: int) -> Reading:
        hf.register(NAME, min_seqlen=1, **settings.to_dict())
        return reader.sparse(NAME, repeats)

    trials = []
    with tqdm(desc="dense", disable=None) as progress:
        dense = reader.dense(repeats)
        progress.set_description("which layers can run sparse")
        first = read(base, 1)
        if not first.layers:
            reasons = ", ".join(sorted({reason for _, reason in first.dense}))
            raise ModelError(f"--model: no layer of {reader.about_model} can run sparse: {reasons}")
        settings = replace(sweep, proxies=sweep.proxies or _proxies(first)).settings(base)
        progress.reset(total=len(settings))
        for setting in settings:
            progress.set_description(
                f"gamma {setting.gamma:g}, {setting.num_proxy_heads} proxies, "
                f"stride {setting.stride}"
            )
            trials.append(Trial(setting, read(setting, repeats)))
            progress.update(1)
    return TuneResult(reader, base, max_loss, dense, trials, hf.MIN_SEQLEN[device.type])


def _proxies(reading: Reading) -> list[int]:
    """The default number of proxies, and the next smaller and larger ones that all layers allow."""
    layers = {(layer.call.counts.shape[1], layer.kv_heads) for layer in reading.layers}
    allowed = sorted(set.intersection(*(set(legal_proxy_heads(*heads)) for heads in layers)))
    default = Settings().resolve(*max(layers)).num_proxy_heads
    place = min(range(len(allowed)), key=lambda index: abs(allowed[index] - default))
    return allowed[max(0, place - 1) : place + 2]


def tune_report(result: TuneResult) -> str:
    """The result as text."""
    base = replace(result.base, gamma=None, num_proxy_heads=None)
    parts = [
        header(result.reader, {"settings": describe(base, *result.reader.heads) + "; swept below"}),
        _trial_table(result),
    ]
    best = result.best
    if best is None:
        least = min(result.loss_over_dense(trial) for trial in result.trials)
        parts.append(
            f"no setting is within {result.max_loss:g} nats of dense attention; the nearest is "
            f"{least:+.4f}. Try larger values of --gammas, or a larger --max-loss"
        )
        return "\n\n".join(parts)
    settings = best.settings
    values = f"gamma={settings.gamma:g}, num_proxy_heads={settings.num_proxy_heads}, "
    values += f"stride={settings.stride}"
    parts += [
        f"cheapest within {result.max_loss:g} nats of dense attention: {values}",
        layer_table(best.reading, f"layers, {values}"),
    ]
    length = result.reader.ids.shape[1]
    if length < result.min_seqlen:
        parts.append(
            f"the prompt is shorter than min_seqlen, {result.min_seqlen} tokens here, from which "
            "on register() lets layers run sparse; a longer --text or --length says more"
        )
    return "\n\n".join(parts)


def _trial_table(result: TuneResult) -> str:
    best = result.best
    rows = []
    for trial in sorted(result.trials, key=lambda trial: trial.reading.share):
        settings, reading = trial.settings, trial.reading
        over = result.loss_over_dense(trial)
        rows.append(
            (
                f"{settings.gamma:g}",
                str(settings.num_proxy_heads),
                str(settings.stride),
                percent(reading.share),
                f"{reading.loss:.4f}",
                f"{over:+.4f}",
                percent(float(trial.kept.min())),
                percent(float(median(trial.kept))),
                milliseconds(reading.milliseconds),
                "cheapest" if trial is best else "" if over <= result.max_loss else "over limit",
            )
        )
    dense = result.dense
    prefill = milliseconds(dense.milliseconds)
    rows.append(("dense", "", "", percent(1.0), f"{dense.loss:.4f}", "", "", "", prefill, ""))
    headers = (
        "gamma",
        "proxies",
        "stride",
        "blocks read",
        "loss",
        "over dense",
        "kept, least",
        "median",
        "prefill ms",
        "",
    )
    meanings = {
        "blocks read": "of the key blocks that dense attention reads, all sparse layers together",
        "loss": "nats per token of the prompt",
        "kept": "attention that lies in the blocks read: the layer that keeps least, and the "
        "median layer",
        "prefill": "of the whole model, without its output logits",
    }
    return f"{table(headers, rows)}\n{legend(meanings)}"
