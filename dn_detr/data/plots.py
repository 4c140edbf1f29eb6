"""Pictures of a data set: classes, boxes an image, sizes of images and boxes.

Needs matplotlib and numpy only.
"""

import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dn_detr.data.findings import show
from dn_detr.data.summary import LARGE, SMALL, Summary

_MOST_BARS = 100  # classes; above it the curve over all ranks
_COLOR, _MARK = "C0", "C3"
_SIZES_SHOWN = 20_000  # images, in the scatter plot


def plot_summary(summary: Summary, title: str, output: str) -> None:
    """Draws a set as one picture of five panels.

    Args:
        summary: of ``summarize``, with at least one image.
        title: stands above.
        output: the PNG to write; its folder is made.
    """
    bars = len(summary.names) <= _MOST_BARS
    height = max(7.0, 0.15 * len(summary.names)) if bars else 7.0
    figure = Figure(figsize=(15, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplot_mosaic("CNS;CBR", width_ratios=(1.2, 1, 1))
    (_plot_bars if bars else _plot_ranks)(panels["C"], summary)
    _plot_per_image(panels["N"], summary)
    _plot_image_sizes(panels["S"], summary)
    _plot_box_sizes(panels["B"], summary)
    _plot_shapes(panels["R"], summary)
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    figure.savefig(output)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _shorten(name: str) -> str:
    # "$" would start a formula.
    name = show(name).replace("$", r"\$")
    return name if len(name) <= 24 else name[:21] + "..."


def _plot_bars(axes: Axes, summary: Summary) -> None:
    places = np.arange(len(summary.names))
    axes.barh(places, summary.boxes, color=_COLOR)
    axes.set_yticks(places, [_shorten(name) for name in summary.names])
    axes.tick_params(axis="y", labelsize=8 if len(places) > 30 else 10)
    axes.set_ylim(len(places) - 0.5, -0.5)
    found = summary.boxes[summary.boxes > 0]
    is_log = len(found) > 0 and found.max() > 100 * found.min()
    if is_log:
        axes.set_xscale("log")
    axes.bar_label(axes.containers[0], fmt="{:,.0f}", padding=3, fontsize=8)
    most = summary.boxes.max(initial=1)
    axes.set_xlim((0.5, 5 * most) if is_log else (0, 1.15 * most))
    _label(axes, "Boxes of each class", "boxes (log)" if is_log else "boxes", "")
    axes.grid(axis="y", alpha=0)


def _plot_ranks(axes: Axes, summary: Summary) -> None:
    order = np.argsort(-summary.boxes, kind="stable")
    boxes = summary.boxes[order]
    axes.plot(np.arange(1, len(order) + 1), np.maximum(boxes, 0.5), color=_COLOR, lw=2)
    axes.set_yscale("log")
    last = int((boxes > 0).sum()) - 1
    for rank in sorted({0, *(int(last * part) for part in (0.25, 0.5, 0.75)), max(0, last)}):
        text = f"{_shorten(summary.names[order[rank]])}: {boxes[rank]:,}"
        left = rank > 0.6 * len(order)
        side, offset = ("right", (-6, -12)) if left else ("left", (6, 6))
        axes.plot(rank + 1, max(boxes[rank], 0.5), "o", color=_MARK, ms=4)
        axes.annotate(
            text,
            (rank + 1, max(boxes[rank], 0.5)),
            xytext=offset,
            textcoords="offset points",
            ha=side,
        )
    none = len(boxes) - 1 - last
    title = f"Boxes of {len(order):,} classes" + (f", {none:,} without any" if none else "")
    _label(axes, title, "rank of the class", "boxes (log)")
    axes.margins(y=0.12)


def _plot_per_image(axes: Axes, summary: Summary) -> None:
    most = int(summary.per_image.max(initial=1))
    step = max(1, -(-(most + 1) // 60))
    axes.hist(summary.per_image, np.arange(0, most + step + 1, step) - 0.5, color=_COLOR)
    if most > 20:
        axes.set_yscale("log")
    empty = int((summary.per_image == 0).sum())
    title = f"Boxes an image (mean {summary.per_image.mean():.1f}; {empty:,} without)"
    _label(axes, title, "boxes", "images (log)" if most > 20 else "images")


def _plot_image_sizes(axes: Axes, summary: Summary) -> None:
    sizes = summary.sizes
    if len(sizes) > _SIZES_SHOWN:
        sizes = sizes[np.random.default_rng(0).permutation(len(sizes))[:_SIZES_SHOWN]]
    distinct, counts = np.unique(sizes, axis=0, return_counts=True)
    area = 12 + 200 * counts / counts.max()  # of a marker: 12 for a size that occurs once
    axes.scatter(*distinct.T, s=area, color=_COLOR, alpha=0.35, linewidths=0)
    if sizes.max() > 20 * max(1, sizes.min()):
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.margins(0.12)
    title = f"Sizes of images ({len(distinct):,} different)"
    _label(axes, title, "width in pixels", "height in pixels")


def _log_bins(low: float, high: float) -> np.ndarray:
    return np.geomspace(low, max(high, 1.01 * low), 50)


def _scale_by_powers_of_two(axes: Axes) -> None:
    """A logarithmic x axis that is marked 32, 64, 128: those of ten leave few or crowd."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")


def _plot_box_sizes(axes: Axes, summary: Summary) -> None:
    sides = np.sqrt(np.maximum(summary.areas, 0.01))
    if len(sides):
        axes.hist(sides, _log_bins(sides.min(), sides.max()), color=_COLOR)
    _scale_by_powers_of_two(axes)
    for limit in (SMALL, LARGE):
        axes.axvline(limit**0.5, color=_MARK, lw=1, ls="--")
    parts = ((summary.areas < SMALL), (summary.areas >= LARGE))
    small, large = (part.mean() if len(part) else 0.0 for part in parts)
    title = f"Boxes: small {small:.0%}, medium {1 - small - large:.0%}, large {large:.0%}"
    _label(axes, title, "square root of the area in pixels (dashed: 32, 96)", "boxes")


def _plot_shapes(axes: Axes, summary: Summary) -> None:
    ratios = summary.extents[:, 0] / summary.extents[:, 1]
    if len(ratios):
        reach = max(2.0, ratios.max(), 1 / ratios.min())
        axes.hist(ratios, _log_bins(1 / reach, reach), color=_COLOR)
    _scale_by_powers_of_two(axes)
    axes.axvline(1, color=_MARK, lw=1, ls="--")
    _label(axes, "Shapes of boxes", "width / height (left: tall, right: wide)", "boxes")
