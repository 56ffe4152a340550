"""The results of quality.py: kept as JSON, shown as tables, verdicts and a plot."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Row:
    """One selector on one model and length."""

    family: str
    settings: dict  # what differs from the family's defaults
    read: float = 1.0  # of the causal key blocks
    right: list[bool] = field(default_factory=list)  # by question
    loss: float = 0.0  # nats per token of text
    seconds: float = 0.0

    @property
    def name(self) -> str:
        values = [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.settings.items()
        ]
        return ", ".join([self.family, *values])


@dataclass
class Cell:
    """One model at one length; the first row is dense attention."""

    model: str
    length: int
    rows: list[Row]

    @property
    def name(self) -> str:
        return f"{self.model} {self.length}"


@dataclass
class Results:
    machine: str
    cells: list[Cell] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.replace(path)

    @staticmethod
    def load(paths: list[Path]) -> "Results":
        """What was saved, of several runs together."""
        together = Results("")
        for path in paths:
            saved = json.loads(path.read_text())
            together.machine = saved["machine"]
            together.left_out += saved["left_out"]
            together.cells += [
                Cell(cell["model"], cell["length"], [Row(**row) for row in cell["rows"]])
                for cell in saved["cells"]
            ]
        return together


def cell_table(cell: Cell) -> str:
    """Markdown."""
    heads = ["selector", "read", "right", "of dense's", "loss", "over dense", "s"]
    dense = cell.rows[0]
    lines = [f"{cell.model}, {cell.length} tokens", "", _line(heads), "|---" * len(heads) + "|"]
    for row in cell.rows:
        lines.append(
            _line(
                [
                    row.name,
                    f"{row.read:.3f}",
                    f"{sum(row.right)} of {len(row.right)}",
                    f"{_both(row, dense)} of {sum(dense.right)}",
                    f"{row.loss:.4f}",
                    f"{row.loss - dense.loss:+.4f}",
                    f"{row.seconds:.1f}",
                ]
            )
        )
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _both(row: Row, dense: Row) -> int:
    """Questions that dense attention answers and so does the row."""
    return sum(mine and its for mine, its in zip(row.right, dense.right, strict=True))


# ---- verdicts


@dataclass(frozen=True)
class Target:
    """What settings of proxyattn promise; shares of the questions that dense attention answers."""

    settings: dict
    kept: float  # over all cells
    kept_in_a_cell: float
    read: dict[int, float]  # by length, of the causal key blocks
    loss: float | None  # nats over dense

    @property
    def name(self) -> str:
        return Row("proxyattn", self.settings).name


TARGETS = (
    Target({}, kept=0.97, kept_in_a_cell=0.93, read={16_384: 0.31, 32_768: 0.30}, loss=0.005),
    Target(
        {"gamma": 0.8},
        kept=0.94,
        kept_in_a_cell=0.0,
        read={16_384: 0.21, 32_768: 0.20},
        loss=None,
    ),
)


def verdicts(results: Results) -> list[str]:
    """One sentence for each target and cell, and one for all cells of a target."""
    lines = []
    for target in TARGETS:
        pairs = []
        for cell in results.cells:
            row = next(
                (r for r in cell.rows if (r.family, r.settings) == ("proxyattn", target.settings)),
                None,
            )
            if row is not None:
                pairs.append((row, cell.rows[0]))
                lines.append(f"{cell.name}, {target.name}: {_cell_verdict(target, cell, row)}")
        if pairs:
            right = sum(sum(row.right) for row, _ in pairs)
            wanted = sum(sum(dense.right) for _, dense in pairs)
            said = _right(right, wanted, target.kept)
            lines.append(f"all {len(pairs)} together, {target.name}: {said}")
    return lines


def _cell_verdict(target: Target, cell: Cell, row: Row) -> str:
    dense = cell.rows[0]
    parts = [_right(sum(row.right), sum(dense.right), target.kept_in_a_cell)]
    if cell.length in target.read:
        parts.append(_most("read", row.read, target.read[cell.length], ".3f"))
    if target.loss is not None:
        parts.append(_most("loss over dense", row.loss - dense.loss, target.loss, "+.4f"))
    return "; ".join(parts)


def _right(right: int, of_dense: int, least: float) -> str:
    share = right / of_dense if of_dense else 1.0
    met = "met" if share >= least else "MISSED"
    return f"answers {right} where dense answers {of_dense}, {share:.1%} (least {least:.0%}) {met}"


def _most(what: str, value: float, most: float, form: str) -> str:
    return f"{what} {value:{form}} (most {most:g}) {'met' if value <= most else 'MISSED'}"


# ---- plot

_COLOURS = {
    "proxyattn": "tab:blue",
    "paper": "tab:orange",
    "XAttention": "tab:green",
    "FlexPrefill": "tab:red",
}


def plot(results: Results, path: Path) -> None:
    """Answers and loss against blocks read; a line joins what differs in gamma alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    figure, axes = pyplot.subplots(
        2,
        len(results.cells),
        figsize=(4.2 * len(results.cells) + 0.8, 7.5),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (above, below), cell in zip(axes.T, results.cells, strict=True):
        dense = cell.rows[0]
        above.set_title(f"{cell.model}\n{cell.length:,} tokens")
        above.set_ylabel(f"questions answered of {len(dense.right)}")
        below.set_ylabel("loss over dense, nats per token")
        below.set_xlabel("causal key blocks read")
        above.axhline(sum(dense.right), color="black", linestyle="--", label="dense")
        below.axhline(0, color="black", linestyle="--", label="dense")
        for family, colour in _COLOURS.items():
            rows = [row for row in cell.rows if row.family == family]
            sweep = [row for row in rows if set(row.settings) == {"gamma"}]
            sweep.sort(key=lambda row: row.read)
            rest = [row for row in rows if row not in sweep]
            for axis, height in (
                (above, lambda row: sum(row.right)),
                (below, lambda row, dense=dense: row.loss - dense.loss),
            ):
                for chosen, style in ((sweep, "o-"), (rest, "o")):
                    if chosen:
                        axis.plot(
                            [row.read for row in chosen],
                            [height(row) for row in chosen],
                            style,
                            color=colour,
                            markersize=5 if chosen is sweep else 4,
                            alpha=1.0 if chosen is sweep or family != "proxyattn" else 0.45,
                        )
        for axis in (above, below):
            axis.set_xlim(0, None)
            axis.grid(alpha=0.3)
    handles = [
        pyplot.Line2D([], [], color=colour, marker="o", linestyle="", label=family)
        for family, colour in _COLOURS.items()
    ]
    handles.append(pyplot.Line2D([], [], color="black", linestyle="--", label="dense"))
    axes[0][0].legend(handles=handles, loc="lower right")
    figure.savefig(path, dpi=110)
