"""``python -m proxyattn``: sparse prefill attention against dense, measured on this machine."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace

import torch

from proxyattn._layer_report import layer_report
from proxyattn._layer_run import LayerShape, run_layer
from proxyattn._model import ModelError, first_line, is_out_of_memory
from proxyattn._model_run import model_report, run_model
from proxyattn._options import (
    DTYPES,
    LAYER_DEFAULTS,
    MODEL_LENGTH,
    PRESETS,
    PROGRAM,
    main_parser,
    tune_parser,
)
from proxyattn._plot import PlotError, check_plot, plot_layer, plot_model
from proxyattn._report import why_not_writable
from proxyattn._tune import Sweep, tune, tune_report
from proxyattn.settings import Settings

MIN_LENGTH = 1024  # of a made-up layer: room for the needles and their questions
INTERRUPTED = 130  # the exit code of a shell's command that Ctrl-C ended


# ---- options to values


def _settings(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Settings:
    names = [field.name for field in fields(Settings)]
    given = {name: getattr(options, name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    settings = replace(PRESETS[options.preset], **given)
    try:
        settings.check()
    except ValueError as error:
        parser.error(first_line(error))
    return settings


def _to_compare(settings: Settings) -> dict[str, Settings]:
    """The settings under their name, first, and the presets."""
    # Any heads will do: those that are left open stand for the same in both.
    same = [n for n, preset in PRESETS.items() if preset.resolve(1, 1) == settings.resolve(1, 1)]
    return {(same or ["as given"])[0]: settings} | PRESETS


def _device(parser: argparse.ArgumentParser, name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    except RuntimeError:
        parser.error(f"argument --device: must be cuda, cuda:N or cpu, got {name}")
    if device.type not in ("cuda", "cpu"):
        parser.error(f"argument --device: must be cuda, cuda:N or cpu, got {name}")
    if device.type == "cuda":
        if not has_gpu:
            parser.error(f"argument --device: got {name}, but torch finds no GPU")
        if (device.index or 0) >= torch.cuda.device_count():
            parser.error(f"argument --device: got {name}, of {torch.cuda.device_count()} GPUs")
        # Some versions of torch take no device without an index here.
        torch.cuda.set_device(device.index or 0)
    return device


def _model_dtype(options: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    if options.dtype:
        return DTYPES[options.dtype]
    return torch.float32 if device.type == "cpu" else None


def _check_at_least(
    parser: argparse.ArgumentParser, options: argparse.Namespace, least: dict[str, int]
) -> None:
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and given < value:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: must be at least {value}, got {given}")


def _layer_shape(
    parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device
) -> LayerShape:
    least = {"length": MIN_LENGTH, "heads": 1, "kv_heads": 1, "head_dim": 1, "repeats": 1}
    _check_at_least(parser, options, least)
    shape = LayerShape(
        options.length,
        options.heads,
        options.kv_heads,
        options.head_dim,
        DTYPES[options.dtype],
        device,
    )
    # Asked here, since a system that promises more memory than it has ends the process instead.
    if shape.num_bytes > _memory(device):
        parser.error(_out_of_memory(device))
    return shape


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _out_of_memory(device: torch.device) -> str:
    return f"out of memory on {device}; try a shorter --length"


def _check_op(parser: argparse.ArgumentParser, shape: LayerShape, settings: Settings) -> None:
    """The op's own rules about heads, head_dim and dtype, asked with tensors that hold nothing."""
    empty = {"dtype": shape.dtype, "device": shape.device}
    q = torch.empty(0, 0, shape.heads, shape.head_dim, **empty)
    k = torch.empty(0, 0, shape.kv_heads, shape.head_dim, **empty)
    try:
        settings.attend(q, k, k)
    except (ValueError, TypeError, RuntimeError) as error:
        parser.error(first_line(error))


# ---- the jobs


def _run_layer(
    parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device
) -> None:
    for name in ("text", "min_seqlen"):
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: needs --model DIR, the model that reads")
    for name, value in LAYER_DEFAULTS[device.type].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    settings = _to_compare(_settings(parser, options))
    shape = _layer_shape(parser, options, device)
    for setting in settings.values():
        _check_op(parser, shape, setting)
    if options.plot:
        check_plot(options.plot)
    result, layer, stages = run_layer(shape, settings, options.seed, options.repeats)
    print(layer_report(result))
    if options.plot:
        plot_layer(layer, stages, next(iter(settings.values())), options.plot)
        print(f"\ndrawn to {options.plot}")


def _run_model(
    parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device
) -> None:
    if options.text is None:
        parser.error("argument --model: needs --text FILE, the text to read")
    _check_at_least(parser, options, {"length": 2, "repeats": 1, "min_seqlen": 1})
    settings = _to_compare(_settings(parser, options))
    if options.plot:
        check_plot(options.plot)
    result = run_model(
        options.model,
        options.text,
        options.length or MODEL_LENGTH[device.type],
        _model_dtype(options, device),
        device,
        settings,
        options.min_seqlen,
        options.repeats or 1,
    )
    print(model_report(result))
    if options.plot:
        plot_model(result, options.plot)
        print(f"\ndrawn to {options.plot}")


def _run_tune(
    parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device
) -> int:
    _check_at_least(parser, options, {"length": 2, "repeats": 1})
    base = _settings(parser, options)
    sweep = Sweep(options.gammas, options.strides, options.proxies)
    for settings in sweep.settings(base):
        try:
            settings.check()
        except ValueError as error:
            parser.error(first_line(error))
    if options.json and (reason := why_not_writable(options.json)):
        parser.error(f"argument --json: {options.json} can't be written: {reason}")
    result = tune(
        options.model,
        options.text,
        options.length or MODEL_LENGTH[device.type],
        _model_dtype(options, device),
        device,
        base,
        sweep,
        options.max_loss,
        options.repeats,
    )
    print(tune_report(result))
    if result.best is None:
        return 1
    if options.json:
        try:
            options.json.write_text(json.dumps(result.best.settings.to_dict(), indent=2) + "\n")
        except OSError as error:
            parser.error(f"argument --json: {options.json} can't be written: {error}")
        print(f"\nwritten to {options.json}")
    return 0


Job = Callable[[argparse.ArgumentParser, argparse.Namespace, torch.device], int | None]


def _run(parser: argparse.ArgumentParser, arguments: list[str], job: Job | None = None) -> int:
    options = parser.parse_args(arguments)
    device = _device(parser, options.device)
    if job is None:
        job = _run_layer if options.model is None else _run_model
    try:
        return job(parser, options, device) or 0
    except (ModelError, PlotError) as error:
        parser.error(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parser.error(_out_of_memory(device))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit code is 0, 1 where tuning finds nothing, 2 for an error, and 130
    where Ctrl-C ended it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["tune"]:
            return _run(tune_parser(), arguments[1:], _run_tune)
        return _run(main_parser(), arguments)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
