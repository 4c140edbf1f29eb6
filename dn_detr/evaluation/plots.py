"""Curves of a training, from the `metrics.json` that it writes: losses, and AP over time.

Needs matplotlib only, not detectron2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Series = tuple[list[int], list[float]]

# Only the last decoder layer has names without a number; the others follow it, and would hide it.
MATCHED = ("loss_ce", "loss_bbox", "loss_giou")
DENOISING = tuple(f"dn_{name}" for name in MATCHED)


def read_metrics(path: str | Path) -> dict[int, dict[str, float]]:
    """Reads what detectron2's JSONWriter wrote.

    Args:
        path: a metrics.json, one JSON object a line.

    Returns:
        iteration -> {name: value}, in order. What a resumed training wrote again counts as last
        written; values that are not finite are left out.

    Raises:
        ValueError: there is no such file, or nothing in it, or a line is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no {path}: a training writes it into its train.output_dir")
    metrics: dict[int, dict[str, float]] = {}
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            iteration = int(entry.pop("iteration"))
        except (ValueError, KeyError, AttributeError) as error:
            if number == len(lines):
                break  # a training that was killed, or that is writing just now
            raise ValueError(f"{path}, line {number}, is not an entry of a metrics.json") from error
        finite = {k: v for k, v in entry.items() if isinstance(v, (int, float)) and _finite(v)}
        metrics.setdefault(iteration, {}).update(finite)
    if not metrics:
        raise ValueError(f"{path} holds no metrics yet")
    return dict(sorted(metrics.items()))


def _finite(value: float) -> bool:
    return math.isfinite(value)


def series(metrics: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> Series:
    """The sum of some values over the iterations that have all of them; empty where none has.

    Args:
        metrics: of `read_metrics`.
        names: such as ("loss_ce", "loss_bbox", "loss_giou").

    Returns:
        iterations and sums.
    """
    points = {
        iteration: sum(entry[name] for name in names)
        for iteration, entry in metrics.items()
        if all(name in entry for name in names)
    }
    return list(points), list(points.values())


def plot_curves(runs: Mapping[str, str | Path], output: str | Path) -> None:
    """Draws the curves of one training, or of several over one another.

    Left: the losses of the last decoder layer, matched and denoising. Right: box AP and AP50 (of
    averaged weights too, where there are any).

    Args:
        runs: label -> metrics.json; each gets a colour of its own.
        output: the PNG to write.

    Raises:
        ValueError: a file cannot be read, see `read_metrics`.
    """
    metrics = {label: read_metrics(path) for label, path in runs.items()}
    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, precision = figure.subplots(1, 2)
    for number, (label, entries) in enumerate(metrics.items()):
        prefix = f"{label}: " if len(metrics) > 1 else ""
        _plot_losses(losses, entries, prefix, f"C{number}")
        _plot_precision(precision, entries, prefix, f"C{number}")
    _finish(losses, "Loss of the last decoder layer", "weighted sum")
    _finish(precision, "Box AP on the validation images", "AP in %")
    precision.set_ylim(bottom=0)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def _plot_losses(
    axes: Axes, metrics: Mapping[int, Mapping[str, float]], prefix: str, color: str
) -> None:
    for names, text, style in ((MATCHED, "matched", "-"), (DENOISING, "denoising", "--")):
        iterations, values = series(metrics, names)
        if iterations:
            axes.plot(iterations, values, style, color=color, label=f"{prefix}{text}", lw=1.4)


def _plot_precision(
    axes: Axes, metrics: Mapping[int, Mapping[str, float]], prefix: str, color: str
) -> None:
    lines = (
        ("bbox/AP", "AP", "-", 1.0),
        ("bbox/AP50", "AP50", ":", 1.0),
        ("bbox_ema/AP", "AP of EMA", "-", 0.45),
        ("bbox_ema/AP50", "AP50 of EMA", ":", 0.45),
    )
    for name, text, style, alpha in lines:
        iterations, values = series(metrics, (name,))
        if iterations:
            last = f"{prefix}{text} {values[-1]:.1f}"
            axes.plot(
                *(iterations, values, style),
                **dict(color=color, alpha=alpha, label=last, lw=1.6, marker="o", ms=3),
            )


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.set_ylabel(unit)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        # Below the curves: with several runs it is too large to stand among them.
        below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.14))
        axes.legend(**below, ncols=2, frameon=False, fontsize="small")
    else:
        axes.text(0.5, 0.5, "nothing recorded", ha="center", transform=axes.transAxes)
