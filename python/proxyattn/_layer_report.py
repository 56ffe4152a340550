"""What the main job found on one layer, as text."""

from collections.abc import Callable
from statistics import mean

from proxyattn._layer_run import TOTAL, LayerResult, SparseResult
from proxyattn._report import describe, legend, machine, milliseconds, percent, table

#: The column of what a head needs, by budget mode: name, meaning, and how a value is written.
_NEEDS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "top_p": (
        "forced hold",
        "attention of the last queries that lies in the sink and local blocks, which are read "
        "anyway",
        percent,
    ),
    "last_block": (
        "budget",
        "blocks that hold the share gamma of the last queries' attention",
        lambda blocks: str(int(blocks)),
    ),
}


def layer_report(result: LayerResult) -> str:
    """The whole report: what ran, each head, each stage, and the comparison."""
    name, asked = next(iter(result.sparse.items()))
    return "\n\n".join(
        [
            _header(result),
            _head_table(result, name, asked),
            _stage_table(name, asked),
            _comparison(result),
        ]
    )


def _header(result: LayerResult) -> str:
    shape = result.shape
    dtype = str(shape.dtype).removeprefix("torch.")
    layer = (
        f"made up from seed {result.seed}: {shape.length} tokens, {shape.heads} query heads, "
        f"{shape.kv_heads} kv heads, head_dim {shape.head_dim}, {dtype}"
    )
    lines = {"layer": layer} | {
        name: describe(sparse.settings, shape.heads, shape.kv_heads)
        for name, sparse in result.sparse.items()
    }
    return f"{machine(shape.device)}\n{legend(lines)}"


def _head_table(result: LayerResult, name: str, asked: SparseResult) -> str:
    need, need_meaning, write = _NEEDS[asked.settings.budget_mode]
    headers = ("head", need, "blocks read", "kept", "error", "needles", "by dense")
    rows = [
        (
            str(index),
            write(head.need),
            percent(head.read),
            percent(head.kept),
            f"{head.error:.4f}",
            str(head.needles),
            str(by_dense),
        )
        for index, (head, by_dense) in enumerate(
            zip(asked.heads, result.dense.needles, strict=True)
        )
    ]
    meanings = {
        need: need_meaning,
        "blocks read": "of the key blocks that dense attention reads",
        "kept": f"attention that lies in the blocks read, mean over {result.num_rows} sampled "
        "queries",
        "error": "of those queries' outputs against exact attention in float64, relative L2",
        "needles": f"questions answered, of {result.num_needles}; by dense: by exact attention",
    }
    return f"heads, {name}\n{table(headers, rows)}\n{legend(meanings)}"


def _stage_table(name: str, asked: SparseResult) -> str:
    stages = {stage: ms for stage, ms in asked.times.items() if stage != TOTAL}
    summed = sum(stages.values())
    rows = [(stage, milliseconds(ms), percent(ms / summed)) for stage, ms in stages.items()]
    rows.append((f"{TOTAL}, all in one call", milliseconds(asked.times[TOTAL]), ""))
    return f"stages, {name}\n" + table(("stage", "ms", "of their sum"), rows)


def _comparison(result: LayerResult) -> str:
    backends = sorted(result.dense.times.items(), key=lambda item: item[1])
    fastest = backends[0][1]
    asked = len(result.dense.needles) * result.num_needles

    def row(name: str, read: float, kept: float, error: float, needles: int, ms: float):
        return (
            name,
            percent(read),
            percent(kept),
            f"{error:.1e}",
            f"{needles} of {asked}",
            milliseconds(ms),
            f"{fastest / ms:.2f}x",
        )

    rows = []
    for name, sparse in result.sparse.items():
        needles = sum(head.needles for head in sparse.heads)
        kept, error = _mean(sparse, "kept"), _mean(sparse, "error")
        rows.append(row(name, _mean(sparse, "read"), kept, error, needles, sparse.times[TOTAL]))
    dense_error, dense_needles = mean(result.dense.errors), sum(result.dense.needles)
    rows += [
        row(f"torch dense, {backend}", 1.0, 1.0, dense_error, dense_needles, ms)
        for backend, ms in backends
    ]
    headers = ("attention", "blocks read", "kept", "error", "needles", "ms", "speed-up")
    rounding = _mean(next(iter(result.sparse.values())), "kernel_error")
    meanings = {
        "speed-up": f"over torch's fastest dense attention here ({backends[0][0]})",
        "error": f"of which the kernel's rounding: {rounding:.1e}, against exact attention over "
        "the same blocks",
    }
    return f"comparison, means over heads\n{table(headers, rows)}\n{legend(meanings)}"


def _mean(sparse: SparseResult, figure: str) -> float:
    return mean(getattr(head, figure) for head in sparse.heads)
