"""The options of ``python -m proxyattn`` and of its tune, with what they stand for if left out."""

import argparse
from pathlib import Path

import torch

from proxyattn import ops
from proxyattn.settings import Settings

PROGRAM = "python -m proxyattn"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRESETS = {"default": Settings(), "paper": Settings.paper()}
# What a run without options takes: a long prompt of an 8B model on a GPU, seconds on a CPU.
LAYER_DEFAULTS = {
    "cuda": {"length": 131072, "heads": 32, "kv_heads": 8, "dtype": "bfloat16", "repeats": 10},
    "cpu": {"length": 8192, "heads": 8, "kv_heads": 2, "dtype": "float32", "repeats": 3},
}
MODEL_LENGTH = {"cuda": 32768, "cpu": 8192}
TUNE_REPEATS = {"cuda": 3, "cpu": 1}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def _by_device(name: str) -> str:
    return "default: {cuda} on a GPU, {cpu} on a CPU".format(
        **{device: defaults[name] for device, defaults in LAYER_DEFAULTS.items()}
    )


def _by_mode(defaults: dict) -> str:
    return "default: " + ", ".join(f"{value} for {mode}" for mode, value in defaults.items())


def main_parser() -> argparse.ArgumentParser:
    """Of a layer, or of a model with --model."""
    parser = Parser(
        prog=PROGRAM,
        description="Runs sparse prefill attention on a made-up layer, or inside a model with "
        "--model, and compares it with exact and with dense attention.",
        epilog=f"'{PROGRAM} tune --help' finds the settings that suit a model.",
    )
    layer = parser.add_argument_group("layer")
    layer.add_argument("--heads", type=int, help=f"query heads ({_by_device('heads')})")
    layer.add_argument("--kv-heads", type=int, help=f"key/value heads ({_by_device('kv_heads')})")
    layer.add_argument(
        "--head-dim",
        type=int,
        default=128,
        help="64, 128 or 256; on CPUs multiples of 8 too (default: %(default)s)",
    )
    layer.add_argument(
        "--seed", type=int, default=0, help="of the made-up layer (default: %(default)s)"
    )

    model = parser.add_argument_group("model")
    _add_model_options(model, required=False)
    model.add_argument(
        "--min-seqlen",
        type=int,
        metavar="N",
        help="prompts with fewer tokens run dense (default: that of proxyattn.hf.register)",
    )

    both = parser.add_argument_group("layer and model")
    both.add_argument(
        "--length",
        type=int,
        help=f"tokens of the prompt ({_by_device('length')}; with --model "
        f"{MODEL_LENGTH['cuda']} and {MODEL_LENGTH['cpu']})",
    )
    _add_run_options(both, f"{_by_device('dtype')}; with --model the model's own on a GPU")
    both.add_argument(
        "--repeats",
        type=int,
        help=f"timed runs, of which medians are shown ({_by_device('repeats')}; with --model 1)",
    )
    both.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw what a few heads read and miss; with --model, what each head reads",
    )

    sparse = parser.add_argument_group("sparse attention")
    sparse.add_argument(
        "--gamma",
        type=float,
        help="for top_p: a head may drop 1 - gamma of its attention; for last_block: a head reads "
        "as many blocks as hold gamma of the last queries' attention. 1 and more is dense "
        f"({_by_mode(ops.DEFAULT_GAMMA)})",
    )
    sparse.add_argument(
        "--stride",
        type=int,
        help=f"tokens of a window of the estimate: 1, 2, 4 or 8 (default: {Settings.stride})",
    )
    sparse.add_argument(
        "--proxy-heads",
        type=int,
        dest="num_proxy_heads",
        help="rankings of a layer; divides the kv heads, or is a multiple of them that divides the "
        "query heads (default: the kv heads, or enough for "
        f"{ops.MIN_PROXY_HEADS} rankings)",
    )
    _add_base_options(sparse)
    return parser


def tune_parser() -> argparse.ArgumentParser:
    """Of the sweep over a model's settings."""
    parser = Parser(
        prog=f"{PROGRAM} tune",
        description="Reads a text with a model, once dense and once with every setting of a sweep, "
        "and names the cheapest setting that loses no more than a limit.",
    )
    _add_model_options(parser, required=True)
    parser.add_argument(
        "--length",
        type=int,
        help=f"tokens of the text to read (default: {MODEL_LENGTH['cuda']} on a GPU, "
        f"{MODEL_LENGTH['cpu']} on a CPU)",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=0.005,
        help="nats per token that a setting may lose over dense attention (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the cheapest setting here, for proxyattn.hf.register(**json.load(file)) "
        "(default: not written)",
    )
    _add_run_options(parser, "default: float32 on a CPU, the model's own on a GPU")
    parser.add_argument(
        "--repeats",
        type=int,
        help="timed prefills of each setting, of which the median counts (default: "
        f"{TUNE_REPEATS['cuda']} on a GPU, {TUNE_REPEATS['cpu']} on a CPU)",
    )
    sweep = parser.add_argument_group("sweep, all values with all")
    several = {"nargs": "+", "metavar": "X"}
    sweep.add_argument(
        "--gammas",
        type=float,
        default=[0.7, 0.8, 0.9, 0.95],
        help="values of gamma (default: 0.7 0.8 0.9 0.95)",
        **several,
    )
    sweep.add_argument(
        "--proxies",
        type=int,
        help="values of num_proxy_heads (default: the one that None stands for, and the next "
        "smaller and larger that the model allows)",
        **several,
    )
    sweep.add_argument(
        "--strides", type=int, default=[4, 8], help="values of stride (default: 4 8)", **several
    )
    _add_base_options(parser.add_argument_group("of all settings"))
    return parser


def _add_model_options(group, required: bool) -> None:
    group.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        required=required,
        help="folder of a causal language model in Hugging Face format",
    )
    group.add_argument(
        "--text", type=Path, metavar="FILE", required=required, help="text for the model to read"
    )


def _add_run_options(group, dtype_default: str) -> None:
    group.add_argument("--dtype", choices=sorted(DTYPES), help=dtype_default)
    group.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU if there is one)")


def _add_base_options(group) -> None:
    group.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="default",
        help="what options that are not given stand for: this package's defaults, or those of the "
        "paper, arXiv 2509.24745 (default: %(default)s; the defaults here are its)",
    )
    group.add_argument(
        "--budget-mode",
        choices=sorted(ops.DEFAULT_GAMMA),
        help=f"how many blocks each head reads (default: {Settings.budget_mode})",
    )
    group.add_argument(
        "--pooling",
        choices=("mean", "first"),
        help=f"of a window, its mean or its first token (default: {Settings.pooling})",
    )
    group.add_argument(
        "--block-size", type=int, help=f"64 or 128 tokens (default: {Settings.block_size})"
    )
    group.add_argument(
        "--min-budget",
        type=int,
        help="tokens that every head reads at least, in whole blocks "
        f"({_by_mode(ops.DEFAULT_MIN_BUDGET)})",
    )
