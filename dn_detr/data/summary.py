"""What is in a data set, in numbers: a table for the terminal, arrays for the pictures.

Needs numpy only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dn_detr.data.check import DatasetReport
from dn_detr.data.findings import show

SMALL, LARGE = 32.0**2, 96.0**2  # areas in pixels between COCO's small, medium and large
_MOST_ROWS = 100  # of classes, in the terminal
_NAME_WIDTH = 28


@dataclass(frozen=True)
class Summary:
    """The part of a set that can be used, counted.

    Attributes:
        names: [C] of the categories, in the order of their ids.
        ids: [C] category ids.
        boxes, crowds, images: [C], the boxes of each category, how many of them are crowds, and the
            images that hold one.
        sizes: [I, 2], width and height of each image in pixels.
        per_image: [I], boxes of each image.
        extents: [B, 2], width and height of each box, clipped, in pixels.
        areas: [B], as the file says them, in square pixels: these make COCO's sizes.
    """

    names: list[str]
    ids: list[int]
    boxes: np.ndarray
    crowds: np.ndarray
    images: np.ndarray
    sizes: np.ndarray
    per_image: np.ndarray
    extents: np.ndarray
    areas: np.ndarray


def summarize(report: DatasetReport) -> Summary:
    """Counts the categories, images and annotations of a report that can be used."""
    number = {c["id"]: i for i, c in enumerate(report.categories)}
    place = {image["id"]: i for i, image in enumerate(report.images)}
    annotations = [a for a in report.annotations if a["category_id"] in number]
    classes = np.array([number[a["category_id"]] for a in annotations], dtype=np.int64)
    images = np.array([place[a["image_id"]] for a in annotations], dtype=np.int64)
    crowd = np.array([a["iscrowd"] for a in annotations], dtype=bool)
    pairs = np.unique(classes * max(1, len(place)) + images)
    count = len(number)
    return Summary(
        names=[c["name"] for c in report.categories],
        ids=[c["id"] for c in report.categories],
        boxes=np.bincount(classes, minlength=count),
        crowds=np.bincount(classes[crowd], minlength=count),
        images=np.bincount(pairs // max(1, len(place)), minlength=count),
        sizes=np.array([(i["width"], i["height"]) for i in report.images]).reshape(-1, 2),
        per_image=np.bincount(images, minlength=len(place)),
        extents=np.array([a["bbox"][2:] for a in annotations], np.float64).reshape(-1, 2),
        areas=np.array([a["area"] for a in annotations], dtype=np.float64),
    )


def totals(summary: Summary) -> str:
    """Images, sizes and boxes in a few lines."""
    s = summary
    empty = int((s.per_image == 0).sum())
    rows = [
        ("classes", f"{len(s.names):,}, of which {int((s.boxes == 0).sum()):,} have no box"),
        ("images", f"{len(s.sizes):,}, of which {empty:,} have no box"),
        ("boxes", f"{len(s.areas):,}, of which {int(s.crowds.sum()):,} are crowds"),
    ]
    if len(s.sizes):
        rows += [("image width", _spread(s.sizes[:, 0])), ("image height", _spread(s.sizes[:, 1]))]
        rows += [("boxes an image", f"{_spread(s.per_image)}, mean {s.per_image.mean():.1f}")]
    if len(s.areas):
        small, large = (s.areas < SMALL).mean(), (s.areas >= LARGE).mean()
        text = f"small {small:.0%}, medium {1 - small - large:.0%}, large {large:.0%}"
        rows += [("box areas", f"{text} (COCO's limits: 32² and 96² pixels)")]
    return "\n".join(f"  {name:<15}{text}" for name, text in rows)


def _spread(values: np.ndarray) -> str:
    return f"min {values.min():,}, median {np.median(values):,.0f}, max {values.max():,}"


def class_rows(summary: Summary, most_rows: int = _MOST_ROWS) -> str:
    """A line a class, in the order of the classes; of too many the most and the least frequent."""
    order: Sequence[int] = range(len(summary.names))
    left_out = len(order) - most_rows
    if left_out > 0:
        ranked = np.argsort(-summary.boxes, kind="stable").tolist()
        order = ranked[: most_rows // 2] + ranked[-(most_rows - most_rows // 2) :]
    total = max(1, summary.boxes.sum())
    lines = [f"  {'id':>6} {'name':<{_NAME_WIDTH}} {'boxes':>9} {'%':>5} {'images':>8}"]
    for row, i in enumerate(order):
        if left_out > 0 and row == most_rows // 2:
            lines.append(f"  ... {left_out:,} classes between these ...")
        name = show(summary.names[i])
        name = name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 3] + "..."
        share = 100 * summary.boxes[i] / total
        lines.append(
            f"  {summary.ids[i]:>6} {name:<{_NAME_WIDTH}} {summary.boxes[i]:>9,} "
            f"{share:>5.1f} {summary.images[i]:>8,}"
        )
    return "\n".join(lines)
