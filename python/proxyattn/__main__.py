"""``python -m proxyattn``: sparse prefill attention against dense, measured on this machine."""

import argparse
import sys
from pathlib import Path

import torch

from proxyattn._layer_run import LayerShape, layer_report, run_layer
from proxyattn._model_run import ModelError, model_report, run_model
from proxyattn._plot import PlotError, plot_layer, require_matplotlib
from proxyattn._stages import Settings

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What a run without options takes: a long prompt of an 8B model on a GPU, seconds on a CPU.
GPU_DEFAULTS = {"length": 131072, "heads": 32, "kv_heads": 8, "dtype": "bfloat16", "repeats": 10}
CPU_DEFAULTS = {"length": 8192, "heads": 8, "kv_heads": 2, "dtype": "float32", "repeats": 3}
MODEL_LENGTH = {"cuda": 32768, "cpu": 8192}
MIN_LENGTH = 1024  # room for the needles and their questions


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m proxyattn",
        description="Runs sparse prefill attention on a made-up layer, or inside a model with "
        "--model, and compares it with exact and with dense attention.",
    )
    layer = parser.add_argument_group("layer")
    layer.add_argument("--length", type=int, help="tokens of the prompt")
    layer.add_argument("--heads", type=int, help="query heads")
    layer.add_argument("--kv-heads", type=int, help="key/value heads")
    layer.add_argument("--head-dim", type=int, default=128, help="64, 128 or 256")
    layer.add_argument("--dtype", choices=sorted(DTYPES))
    layer.add_argument("--device", help="cuda, cuda:1, cpu; the GPU if there is one")
    layer.add_argument("--seed", type=int, default=0)
    layer.add_argument("--repeats", type=int, help="timed runs; medians are shown")
    layer.add_argument("--plot", metavar="FILE.png", help="draw what a few heads read")

    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="DIR", help="Llama or Qwen in HF format")
    model.add_argument("--text", type=Path, metavar="FILE", help="text for the model to read")

    sparse = parser.add_argument_group("sparse attention")
    sparse.add_argument("--gamma", type=float, default=Settings.gamma, help="attention to keep")
    sparse.add_argument("--stride", type=int, default=Settings.stride, help="1, 2, 4 or 8")
    sparse.add_argument("--block-size", type=int, default=Settings.block_size, help="64 or 128")
    sparse.add_argument("--proxy-heads", type=int, help="rankings; divides --kv-heads")
    sparse.add_argument(
        "--budget-mode", choices=("last_block", "coverage"), default=Settings.budget_mode
    )
    sparse.add_argument("--min-budget", type=int, help="tokens every head reads at least")
    return parser


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


def _settings(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Settings:
    settings = Settings(
        gamma=options.gamma,
        stride=options.stride,
        block_size=options.block_size,
        num_proxy_heads=options.proxy_heads,
        budget_mode=options.budget_mode,
        min_budget=options.min_budget,
    )
    try:
        settings.check()
    except ValueError as error:
        parser.error(_first_line(error))
    return settings


def _layer_shape(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    device: torch.device,
    settings: Settings,
) -> LayerShape:
    if options.length < MIN_LENGTH:
        parser.error(f"argument --length: must be at least {MIN_LENGTH}, got {options.length}")
    for name in ("heads", "kv_heads", "head_dim"):
        if getattr(options, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: must be at least 1, got {getattr(options, name)}")
    shape = LayerShape(
        options.length,
        options.heads,
        options.kv_heads,
        options.head_dim,
        DTYPES[options.dtype],
        device,
    )
    # The op's own rules about heads, head_dim and dtype, asked with tensors that hold nothing.
    empty = {"dtype": shape.dtype, "device": device}
    q = torch.empty(0, 0, shape.heads, shape.head_dim, **empty)
    k = torch.empty(0, 0, shape.kv_heads, shape.head_dim, **empty)
    try:
        settings.attend(q, k, k)
    except (ValueError, TypeError, RuntimeError) as error:
        parser.error(_first_line(error))
    return shape


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _run_layer(
    parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device
) -> None:
    if options.text is not None:
        parser.error("argument --text: needs --model DIR, the model that reads it")
    defaults = GPU_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    settings = _settings(parser, options)
    shape = _layer_shape(parser, options, device, settings)
    if options.plot:
        require_matplotlib()  # before the work, not after it
    result, layer, stages = run_layer(shape, settings, options.seed, options.repeats)
    print(layer_report(result))
    if options.plot:
        plot_layer(layer, stages, settings, options.plot)
        print(f"\ndrawn to {options.plot}")


def _run_model(
    parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device
) -> None:
    if options.text is None:
        parser.error("argument --model: needs --text FILE, the text to read")
    settings = _settings(parser, options)
    dtype = DTYPES[options.dtype] if options.dtype else None
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    result = run_model(
        options.model,
        options.text,
        options.length or MODEL_LENGTH[device.type],
        dtype,
        device,
        settings,
        options.repeats or 1,
    )
    print(model_report(result))


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"argument --repeats: must be at least 1, got {options.repeats}")
    device = _device(parser, options.device)
    run = _run_layer if options.model is None else _run_model
    try:
        run(parser, options, device)
    except (ModelError, PlotError) as error:
        parser.error(str(error))
    except torch.OutOfMemoryError:
        parser.error(f"out of memory on {device}; try a shorter --length")
    return 0


if __name__ == "__main__":
    sys.exit(main())
