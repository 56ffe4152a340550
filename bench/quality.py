"""What finer blocks are worth: quality of a model against time of attention, for 64 and 128.

    python bench/quality.py --model DIR [--plot FILE.png] [--json FILE]

For both block sizes, both budget modes and a few shares gamma it reads source text of --length
tokens with the model and asks it questions about numbers hidden in such text. Each setting reads
some share of the key blocks; how long proxy_attention takes at that share is measured on random
inputs of 32 query and 8 kv heads, head_dim 128, at each of --lengths. Needs a GPU.
"""

import argparse
import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import proxyattn
import torch
import transformers
from proxyattn import hf
from proxyattn._measure import Stopwatch
from proxyattn._model_run import _loss
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from retrieval import NUM_QUESTIONS, num_right, retrieval_prompt, source_text

BLOCK_SIZES = (64, 128)
GAMMAS = {"last_block": (0.8, 0.9, 0.95), "coverage": (0.8, 0.9, 0.95)}
REPEATS = 5


@dataclass
class Row:
    block_size: int | None  # None: dense
    mode: str
    gamma: float
    share: float  # of the key blocks, text and questions together
    loss: float  # nats per token of the text
    right: int
    asked: int
    milliseconds: dict[int, float]  # by length


class Model:
    """The model, the text and the questions."""

    def __init__(self, folder: Path, length: int, num_prompts: int):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model = self.model.cuda().eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(source_text(8 * length), add_special_tokens=False)["input_ids"]
        self.text = torch.tensor([ids[:length]], device="cuda")
        self.prompts = [retrieval_prompt(tokenizer, length, seed) for seed in range(num_prompts)]

    @torch.no_grad()
    def quality(self, implementation: str) -> tuple[float, float, int]:
        """(share of blocks read, loss, questions right)"""
        self.model.set_attn_implementation(implementation)
        with hf.record() as recording:
            loss = _loss(self.model, self.text)
            right = 0
            for ids, answers in self.prompts:
                # Logits of the answers alone: those of a long prompt take gigabytes.
                first = min(span.start for span in answers) - 1
                prompt = torch.tensor([ids], device="cuda")
                hidden = self.model.base_model(prompt, use_cache=False).last_hidden_state[0, first:]
                logits = self.model.get_output_embeddings()(hidden).float().cpu()
                shifted = [range(span.start - first, span.stop - first) for span in answers]
                right += num_right(logits, ids[first:], shifted)
        return recording.share if recording.sparse else 1.0, loss, right


class Layer:
    """One attention layer of each length."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def times(self, run) -> dict[int, float]:
        """Medians in milliseconds of run(q, k, v)."""
        medians = {}
        for length in self.lengths:
            q, k, v = (
                torch.randn(1, length, heads, 128, dtype=torch.bfloat16, device="cuda")
                for heads in (32, 8, 8)
            )
            watch = Stopwatch(torch.device("cuda"))
            run(q, k, v)
            for _ in range(REPEATS):
                with watch("run"):
                    run(q, k, v)
            medians[length] = watch.medians()["run"]
        return medians

    def sparse_times(self, block_size: int, mode: str, share: float) -> dict[int, float]:
        """With the same minimum budget for all heads and rows, so that the share is read."""

        def run(q, k, v):
            budget = round(q.shape[1] * (1 - math.sqrt(max(0.0, 1 - share))))
            return proxyattn.proxy_attention(
                q, k, v, gamma=0.0, min_budget=budget, block_size=block_size, budget_mode=mode
            )

        return self.times(run)


def measure(args: argparse.Namespace) -> list[Row]:
    model, layer = Model(args.model, args.length, args.prompts), Layer(args.lengths)
    asked = args.prompts * NUM_QUESTIONS
    _, loss, right = model.quality("sdpa")
    dense = layer.times(lambda q, k, v: proxyattn.proxy_attention(q, k, v, gamma=1.0))
    rows = [Row(None, "dense", 1.0, 1.0, loss, right, asked, dense)]
    settings = [
        (size, mode, gamma)
        for size, mode in itertools.product(BLOCK_SIZES, GAMMAS)
        for gamma in GAMMAS[mode]
    ]
    for size, mode, gamma in tqdm(settings, disable=None):
        hf.register("proxyattn", gamma=gamma, budget_mode=mode, block_size=size, min_seqlen=1024)
        share, loss, right = model.quality("proxyattn")
        times = layer.sparse_times(size, mode, share)
        rows.append(Row(size, mode, gamma, share, loss, right, asked, times))
    return rows


def print_table(rows: list[Row]) -> None:
    lengths = list(rows[0].milliseconds)
    heads = ["block", "mode", "gamma", "read", "loss", "right", *(f"{n} ms" for n in lengths)]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        cells = [
            str(row.block_size or "-"),
            row.mode,
            f"{row.gamma:g}",
            f"{row.share:.3f}",
            f"{row.loss:.4f}",
            f"{row.right} of {row.asked}",
            *(f"{row.milliseconds[n]:.2f}" for n in lengths),
        ]
        print("| " + " | ".join(cells) + " |")


def plot(rows: list[Row], path: Path) -> None:
    """Loss and wrong answers against time at each length, a line for each size and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    dense, lengths = rows[0], list(rows[0].milliseconds)
    figure, axes = pyplot.subplots(
        2, len(lengths), figsize=(4 * len(lengths), 7), squeeze=False, layout="constrained"
    )
    for column, length in enumerate(lengths):
        for size, mode in itertools.product(BLOCK_SIZES, GAMMAS):
            chosen = [row for row in rows if (row.block_size, row.mode) == (size, mode)]
            times = [row.milliseconds[length] / dense.milliseconds[length] for row in chosen]
            style = {"marker": "o" if size == 64 else "s", "label": f"{size}, {mode}"}
            axes[0][column].plot(times, [row.loss - dense.loss for row in chosen], **style)
            axes[1][column].plot(times, [dense.right - row.right for row in chosen], **style)
        axes[0][column].set_title(f"{length} tokens")
        axes[1][column].set_xlabel("time, dense = 1")
    axes[0][0].set_ylabel("loss over dense, nats per token")
    axes[1][0].set_ylabel(f"answers lost of {dense.asked}")
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama or Qwen model")
    parser.add_argument("--length", type=int, default=32_768, help="tokens the model reads")
    parser.add_argument("--prompts", type=int, default=8, help=f"of {NUM_QUESTIONS} questions each")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 131_072, 262_144])
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = measure(args)
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
