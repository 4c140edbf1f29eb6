"""Results as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dn_detr.benchmark.implementations import GRID_SAMPLE
from dn_detr.benchmark.measuring import Ceilings

HEADER = (
    *("case", "batch", "dtype", "pass", "implementation", "ms", "times faster"),
    *("times the floor", "extra MiB", "results", "of its memory"),
)


@dataclass(frozen=True)
class Row:
    """One implementation in one case.

    Args:
        passes: one of `cases.PASSES`.
        seconds: of each round.
        moved, operations, results: as in `cases.Work`.
        memory: peak bytes beyond the inputs, results included; None where it was not measured.
    """

    case: str
    batch: int
    dtype: str
    passes: str
    implementation: str
    seconds: Sequence[float]
    moved: int
    operations: int
    results: int | None = None
    memory: int | None = None

    @property
    def key(self) -> tuple:
        """What rows have in common that are to be compared."""
        return self.case, self.batch, self.dtype, self.passes

    @property
    def time(self) -> float:
        return statistics.median(self.seconds)


def table(rows: Sequence[Row], ceilings: Ceilings, baseline: str = GRID_SAMPLE) -> str:
    """Markdown; times are medians, ratios those to the baseline in the same case."""
    bases = {row.key: row for row in rows if row.implementation == baseline}
    lines = [line(HEADER), line(["---"] * len(HEADER))]
    for row in rows:
        base = bases.get(row.key)
        floor = ceilings.floor(row.moved, row.operations)
        faster = f"{base.time / row.time:.2f}" if base else ""
        share = f"{row.memory / base.memory:.3f}" if base and base.memory and row.memory else ""
        numbers = (f"{row.time * 1e3:.3f}", faster, f"{row.time / floor:.1f}")
        memory = (mebibytes(row.memory), mebibytes(row.results), share)
        lines.append(line([*map(str, row.key), row.implementation, *numbers, *memory]))
    return "\n".join(lines)


def mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"


def line(cells: Iterable[str]) -> str:
    """Of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def write(
    rows: Sequence[Row],
    ceilings: Ceilings,
    environment: Mapping[str, object],
    folder: str | Path,
) -> list[Path]:
    """Writes benchmark.md, .json and .png into a folder.

    Args:
        environment: what is to be known about machine and run.

    Returns:
        the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text, data, picture = files = [folder / f"benchmark.{end}" for end in ("md", "json", "png")]
    text.write_text(f"{describe(environment)}\n\n{table(rows, ceilings)}\n")
    results = [{**asdict(row), "median": row.time} for row in rows]
    content = {"environment": environment, "ceilings": asdict(ceilings), "rows": results}
    data.write_text(json.dumps(content, indent=1) + "\n")
    plot(rows, ceilings, picture)
    return files


def describe(environment: Mapping[str, object]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in environment.items())


def plot(rows: Sequence[Row], ceilings: Ceilings, path: str | Path) -> None:
    """Bars of the medians, a panel for each pass and dtype, beside the floor."""
    panels = {}
    for row in rows:
        panels.setdefault((row.passes, row.dtype), []).append(row)
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r.implementation for r in rows))}
    heights = [1.2 + 0.24 * len(chosen) for chosen in panels.values()]
    figure = Figure(figsize=(9, 0.6 + sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for (axes,), ((passes, dtype), chosen) in zip(grid, panels.items()):
        _bars(axes, chosen, ceilings, colors)
        axes.set_title(f"{passes}, {dtype}")
    figure.axes[-1].set_xlabel("milliseconds (black: floor)")
    handles = {bar.get_label(): bar for axes in figure.axes for bar in axes.containers}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _bars(axes: Axes, rows: Sequence[Row], ceilings: Ceilings, colors: Mapping[str, str]) -> None:
    cases = list(dict.fromkeys(row.key for row in rows))
    places = {}  # a gap between two cases
    for index, row in enumerate(rows):
        places[id(row)] = index + 0.8 * cases.index(row.key)
    for name in dict.fromkeys(row.implementation for row in rows):
        own = [row for row in rows if row.implementation == name]
        axes.barh(
            [places[id(row)] for row in own],
            [row.time * 1e3 for row in own],
            color=colors[name],
            label=name,
        )
    for row in rows:
        floor, place = ceilings.floor(row.moved, row.operations), places[id(row)]
        axes.plot([floor * 1e3] * 2, [place - 0.4, place + 0.4], color="black", lw=1.2)
    middles = [[places[id(row)] for row in rows if row.key == key] for key in cases]
    axes.set_yticks([sum(m) / len(m) for m in middles], [f"{c[0]}, batch {c[1]}" for c in cases])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
