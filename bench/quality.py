"""What choosing key blocks loses on real models, for each way to choose, beside dense attention.

    python bench/quality.py --gemma DIR --model DIR --json FILE --plot bench/quality.png
    python bench/quality.py --results FILE --plot bench/quality.png

Each model reads prompts of --length tokens, text of installed packages with numbers hidden in it
and questions about them at the end (quality_prompts.py), once with dense attention and once with
every selector (quality_selectors.py). A question is right if the model would say every token of
its answer. The table says which share of the causal key blocks was read in the layers without a
window, how many questions were right, and the loss over the text before them; verdicts compare
that with what the default settings promise. quality_gemma.py says how to get gemma-3-270m; other
models are folders of Hugging Face's form, and read source code unless --style is prose.

Selectors take turns over all models and lengths, the telling ones first. When --time-limit is
over, those that are left are named; --json is written after each row.
"""

import argparse
import sys
import time
from pathlib import Path

import proxyattn
import torch
from quality_gemma import gemma_folder
from quality_prompts import STYLES, make_prompts
from quality_reader import Reader
from quality_report import Cell, Results, Row, cell_table, plot, verdicts
from quality_selectors import PAPER, Dense, FlexPrefill, Proxy, XAttention


def selectors(q_heads: int, kv_heads: int) -> list:
    """What is tried on a model with so many heads, the telling ones first."""
    proxies = [
        g
        for g in range(1, q_heads + 1)
        if kv_heads % g == 0 or (g % kv_heads == 0 and q_heads % g == 0)
    ]
    return [
        Dense(),
        Proxy(),
        Proxy({"gamma": 0.8}),
        Proxy({}, "paper", PAPER),
        XAttention(stride=8),
        FlexPrefill(gamma=0.95),
        *(Proxy({"gamma": gamma}) for gamma in (0.85, 0.9, 0.95)),
        XAttention(stride=16),
        FlexPrefill(gamma=0.9),
        *(Proxy({"num_proxy_heads": g}) for g in proxies),
        *(Proxy({"stride": stride}) for stride in (2, 8)),
        *(Proxy({"block_size": 128, "gamma": gamma}) for gamma in (0.8, 0.9)),
        *(Proxy({"min_budget": tokens}) for tokens in (256, 1024)),
        *(Proxy({"gamma": 0.8, "num_proxy_heads": g}) for g in proxies),
        *(Proxy({"gamma": 0.8, "stride": stride}) for stride in (2, 8)),
        *(Proxy({"gamma": 0.8, "min_budget": tokens}) for tokens in (256, 1024)),
        Proxy({"num_proxy_heads": 1}, "paper", PAPER),
    ]


class Bench:
    """The models, their prompts and what was measured."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.deadline = time.perf_counter() + args.time_limit
        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_gpu else "CPU"
        self.results = Results(
            f"{name}, torch {torch.__version__}, proxyattn {proxyattn.__version__}"
        )
        self.work = []  # (reader, prompts, cell, selectors)

    def load(self) -> None:
        folders = [(folder, self.args.style) for folder in self.args.model]
        if self.args.gemma:
            folders.insert(0, (gemma_folder(self.args.gemma), "prose"))
        for folder, style in folders:
            reader = Reader(folder, style, self.device)
            chosen = [s for s in selectors(*reader.heads) if self.is_asked_for(s)]
            for length in self.args.length:
                prompts = make_prompts(
                    reader.tokenizer, reader.style, length, self.args.questions, self.args.seed
                )
                cell = Cell(reader.name, length, [])
                self.results.cells.append(cell)
                self.work.append((reader, prompts, cell, chosen))

    def is_asked_for(self, selector) -> bool:
        dense = isinstance(selector, Dense)
        return dense or not self.args.only or selector.family in self.args.only

    def run(self) -> None:
        longest = max(len(chosen) for *_, chosen in self.work)
        for turn in range(longest):
            for reader, prompts, cell, chosen in self.work:
                if turn < len(chosen):
                    self.run_row(reader, prompts, cell, chosen[turn])

    def run_row(self, reader: Reader, prompts: list, cell: Cell, selector) -> None:
        row = Row(selector.family, selector.settings)
        started = time.perf_counter()
        # Nothing can be judged without the first row, dense; others take about as long.
        if cell.rows and started + cell.rows[-1].seconds > self.deadline:
            self.results.left_out.append(f"{cell.name}: {row.name}")
            return
        reading = reader.read(prompts, selector, self.args.loss_tokens)
        row.loss, row.right, row.read = reading.loss, reading.right, reading.read
        row.seconds = time.perf_counter() - started
        cell.rows.append(row)
        right = f"{sum(row.right)} of {len(row.right)}"
        print(
            f"{cell.name:24} {row.name:48} read {row.read:.3f}  right {right:10} "
            f"loss {row.loss:.4f}  {row.seconds:.1f} s",
            flush=True,
        )
        if self.args.json:
            self.results.save(self.args.json)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--gemma", type=Path, metavar="DIR", help="where gemma-3-270m was put")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", action="append", default=[], help="may be repeated"
    )
    parser.add_argument("--style", choices=STYLES, default="code", help="of prompts for --model")
    parser.add_argument("--length", type=int, nargs="+", default=[16_384, 32_768], help="tokens")
    parser.add_argument("--questions", type=int, default=192, help="of each model and length")
    parser.add_argument("--loss-tokens", type=int, default=4096, help="whose loss counts, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument(
        "--only", nargs="+", choices=("proxyattn", "paper", "XAttention", "FlexPrefill")
    )
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--time-limit", type=float, default=480.0, help="seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument(
        "--results", type=Path, nargs="+", metavar="FILE", help="show these instead of measuring"
    )
    args = parser.parse_args(arguments)
    if not (args.gemma or args.model or args.results):
        parser.error("one of --gemma, --model and --results is needed")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.results:
        results = Results.load(args.results)
    else:
        bench = Bench(args)
        bench.load()
        bench.run()
        results = bench.results
    print(f"\n# {results.machine}")
    for cell in results.cells:
        print(f"\n{cell_table(cell)}")
    print("\n" + "\n".join(verdicts(results)))
    if results.left_out:
        print("\nout of time for\n  " + "\n  ".join(results.left_out))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    sys.exit(main())
