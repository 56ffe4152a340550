"""Times of a vLLM engine, with vLLM's own attention and with proxyattn's, in one sitting.

    python bench/vllm_latency.py                      # all cases of a Llama-3.1-8B
    python bench/vllm_latency.py --model qwen --cases 'first 128K*,decode*' --json times.json
    python bench/vllm_latency.py --dry-run            # a tiny model on a CPU: the paths, not times

Engines start in processes of their own, the two backends in turn; with --together both start at
once, in half the time and memory for two, and measure one after the other. Weights are random, and
random attention has no structure that a budget could follow, so that shares are set instead: each
case says which part of the causal blocks the long rows read (gamma 0 and a least budget). Such
times are those of a model that needs this share; they say nothing about what a model needs.
"""

import argparse
import fcntl
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

BLOCK = 64
K = 1024
MODELS = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "qwen": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_theta": 1000000.0,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 10240,
    },
}
LARGEST = 256 * K


@dataclass(frozen=True)
class Case:
    """Requests of ``lengths`` tokens, handed over together.

    ``timed`` is "first" (until all first tokens are there), "decode" (from each token to the next)
    or "mix" (tokens in and out in a second).
    """

    name: str
    timed: str
    lengths: tuple[int, ...]
    step: int  # tokens of a step at most
    share: float | None  # of the causal blocks that long rows read; None: the default settings
    cached: int = 0  # tokens of each prompt that the cache has already
    new_tokens: int = 1

    @property
    def eager(self) -> bool:
        """Long prompts gain nothing from graphs, and start sooner without."""
        return self.timed == "first"

    def settings(self) -> dict:
        if self.share is None:
            return {}
        budget = least_budget(self.lengths, self.cached, self.share)
        return {"gamma": 0.0, "min_budget": budget}

    def scaled(self, by: int) -> "Case":
        smaller = {
            "lengths": tuple(length // by for length in self.lengths),
            "step": max(self.step // by, 128),
            "cached": self.cached // by,
            "new_tokens": min(self.new_tokens, 4),
        }
        return replace(self, **smaller)


def least_budget(lengths: tuple[int, ...], cached: int, share: float) -> int:
    """The tokens of which each query block reads at most so many that the requests' blocks behind
    ``cached`` read this share of what they see."""
    seen = [n for length in lengths for n in range(cached // BLOCK + 1, -(-length // BLOCK) + 1)]
    budget = 1
    while budget < max(seen) and sum(min(budget, n) for n in seen) < share * sum(seen):
        budget += 1
    return budget * BLOCK


def cases() -> list[Case]:
    steps = {"whole": LARGEST + K, "steps of 16384": 16 * K, "steps of 8192": 8 * K}
    shares = {32 * K: 0.25, 128 * K: 0.10, 256 * K: 0.065}
    made = [
        Case(f"first {length // K}K, {how}", "first", (length,), step, share)
        for length, share in shares.items()
        for how, step in steps.items()
    ]
    made.append(Case("first 2K after 128K", "first", (130 * K,), 16 * K, 0.10, cached=128 * K))
    for number in (1, 8):
        name = f"decode, {number} at 32K"
        lengths = (32 * K,) * number
        made.append(Case(name, "decode", lengths, 16 * K, None, cached=32 * K, new_tokens=128))
    spread = tuple(4 * K + (60 * K * number) // 15 for number in range(16))
    made.append(Case("mix, 16 of 4K to 64K", "mix", spread, 16 * K, 0.25, new_tokens=128))
    return made


# ---- one engine, in a process of its own


def save_config(model: str, folder: str) -> str:
    config = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": LARGEST + 2 * K,
        "torch_dtype": "bfloat16",
        **MODELS[model],
    }
    Path(folder, "config.json").write_text(json.dumps(config))
    return folder


def cache_bytes(model: str, case: Case) -> int:
    """Of keys and values of all tokens in bfloat16, with some room."""
    shape = MODELS[model]
    head_dim = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    token = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim
    return token * (sum(case.lengths) + len(case.lengths) * (case.new_tokens + 256) + 4 * K)


class Engine:
    def __init__(self, model: str, case: Case, backend: str | None, folder: str, on_cpu: bool):
        from vllm import LLM

        room = max(case.lengths) + case.new_tokens + 1
        self.llm = LLM(
            model=save_config(model, folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="float32" if on_cpu else "bfloat16",
            attention_backend=backend,
            additional_config={"proxyattn": settings_of(case, on_cpu)}
            if backend == "CUSTOM"
            else {},
            max_model_len=room,
            max_num_batched_tokens=min(case.step, -(-sum(case.lengths) // K) * K + K),
            max_num_seqs=max(8, len(case.lengths)),
            enable_prefix_caching=case.cached > 0,
            enforce_eager=case.eager or on_cpu,
            # Its own profile of memory would count what another engine takes meanwhile.
            **({} if on_cpu else {"kv_cache_memory_bytes": cache_bytes(model, case)}),
            gpu_memory_utilization=0.3,
        )
        self.vocabulary = MODELS[model]["vocab_size"]

    def seconds(self, prompts: list[list[int]], new_tokens: int) -> float:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        begin = time.perf_counter()
        self.llm.generate(requests, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    def prompts(self, lengths, seed: int) -> list[list[int]]:
        import torch

        random = torch.Generator().manual_seed(seed)
        draw = lambda n: torch.randint(1, self.vocabulary, (n,), generator=random)  # noqa: E731
        return [draw(length).tolist() for length in lengths]


def settings_of(case: Case, on_cpu: bool) -> dict:
    if not on_cpu:
        return case.settings()
    return {"min_seqlen": 256, "min_queries": 16, **case.settings()}


def measure(engine: Engine, case: Case, repeats: int) -> list[float]:
    """Seconds, of one token after another for "decode", of everything otherwise."""
    begins = engine.prompts((case.cached,) * len(case.lengths), seed=1)
    if case.cached:
        engine.seconds(begins, 1)
    taken = []
    for repeat in range(-1, repeats):  # the first warms up
        ends = [length - case.cached for length in case.lengths]
        new = engine.prompts(ends, seed=repeat + 10)
        prompts = [[*begin, *end] for begin, end in zip(begins, new, strict=True)]
        seconds = engine.seconds(prompts, case.new_tokens)
        if case.timed == "decode":
            seconds = (seconds - engine.seconds(prompts, 1)) / (case.new_tokens - 1)
        taken.append(seconds)
    return taken[1:]


def run_child(task: dict) -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, to read the counts
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if task["on_cpu"]:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from proxyattn.vllm import counts

    case = Case(**{**task["case"], "lengths": tuple(task["case"]["lengths"])})
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(task["model"], case, task["backend"], folder, task["on_cpu"])
        with Path(task["turn"]).open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            seconds = measure(engine, case, task["repeats"])
    print(json.dumps({"seconds": seconds, "rows": counts()}), file=sys.stderr)
    Path(task["out"]).write_text(json.dumps({"seconds": seconds, "rows": counts()}))


# ---- all of them, and the table


class Child:
    """An engine that starts and measures in its own process."""

    def __init__(self, task: dict, folder: str):
        self.out = Path(folder, f"{task['backend']}.json")
        self.log = Path(folder, f"{task['backend']}.log")
        task = {**task, "out": str(self.out), "turn": str(Path(folder, "turn"))}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child", json.dumps(task)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def result(self) -> dict:
        if self.process.wait() != 0:
            tail = "\n".join(self.log.read_text().splitlines()[-30:])
            raise SystemExit(f"vllm_latency: an engine failed, with\n{tail}")
        return json.loads(self.out.read_text())


def compare(case: Case, arguments) -> dict:
    """Seconds of both backends, each from as many engines as there are rounds."""
    ours = theirs = ()
    rows = {}
    backends = (None if arguments.dry_run else arguments.beside, "CUSTOM")
    common = {
        "model": arguments.model,
        "case": asdict(case),
        "repeats": arguments.repeats,
        "on_cpu": arguments.dry_run,
    }
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            children = []
            try:
                for backend in backends:
                    children.append(Child({**common, "backend": backend}, folder))
                    if not arguments.together:
                        children[-1].result()
                their, own = (child.result() for child in children)
            finally:
                for child in children:
                    child.process.kill()
        ours, rows = (*ours, *own["seconds"]), own["rows"]
        theirs = (*theirs, *their["seconds"])
        if their["rows"]:
            raise SystemExit(f"vllm_latency: {backends[0]} ran proxyattn: {their['rows']}")
    if case.timed != "decode" and not rows.get("sparse"):
        raise SystemExit(f"vllm_latency: {case.name}: no row ran sparse: {rows}")
    return {"case": asdict(case), "ours": ours, "theirs": theirs, "rows": rows}


def line(result: dict, beside: str) -> str:
    case = Case(**result["case"])
    ours, theirs = (statistics.median(result[who]) for who in ("ours", "theirs"))
    ratio = theirs / ours
    if case.timed == "mix":
        total = sum(case.lengths) + len(case.lengths) * case.new_tokens
        shown = [f"{total / seconds:.0f} tokens/s" for seconds in (theirs, ours)]
    elif case.timed == "decode":
        shown = [f"{seconds * 1e3:.2f} ms/token" for seconds in (theirs, ours)]
    else:
        shown = [f"{seconds:.3f} s" for seconds in (theirs, ours)]
    spread = max(max(result[who]) / min(result[who]) for who in ("ours", "theirs")) - 1
    share = "-" if case.share is None else f"{case.share:.1%}"
    rows = ", ".join(f"{kind} {number}" for kind, number in sorted(result["rows"].items()))
    cells = (case.name, share, *shown, f"{ratio:.2f}x", f"{spread:.1%}", rows)
    return f"| {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--cases", default="*", help="names, with * and ?, between semicolons")
    parser.add_argument("--beside", default="FLASH_ATTN", help="the other attention backend")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of an engine")
    parser.add_argument("--rounds", type=int, default=1, help="engines of each backend")
    parser.add_argument("--together", action="store_true", help="start both engines at once")
    parser.add_argument("--json", help="a file for all numbers")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="a tiny model and lengths on a CPU, to try the script",
    )
    parser.add_argument("--list", action="store_true", help="name the cases and do nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.model = "tiny"
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        run_child(json.loads(arguments.child))
        return
    patterns = [pattern.strip() for pattern in arguments.cases.split(";")]
    chosen = [c for c in cases() if any(fnmatch.fnmatch(c.name, p) for p in patterns)]
    if not chosen:
        raise SystemExit(f"vllm_latency: --cases must name some, got {arguments.cases!r}")
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return
    print(f"{arguments.model}, medians of {arguments.rounds} engines of {arguments.repeats} runs")
    beside = "vLLM's own" if arguments.dry_run else arguments.beside
    print(f"| case | read | {beside} | proxyattn | ratio | spread | rows times layers |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for case in chosen:
        result = compare(case.scaled(64) if arguments.dry_run else case, arguments)
        results.append(result)
        print(line(result, beside), flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
