"""One pass over a COCO-format annotation file before it is used.

What cannot be used is an error; all errors of a file are collected and reported at once, each with
the first ids and the total. What can be mended is mended by these rules and counted:

- A box is clipped to its image. It is dropped where nothing of it is left: width or height of zero
  or less, before or after clipping.
- ``iscrowd`` is 0 and ``area`` is the area of the clipped box where they are missing.

Images are looked up in the listings of their folders, and not opened.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from dn_detr.data.categories import DatasetError, read_json, sorted_categories

logger = logging.getLogger(__name__)

SHOWN = 10  # ids shown of each problem
CLIP_TOLERANCE = 0.01  # pixels; below it a box over the edge is a rounding error and not counted


@dataclass(frozen=True)
class DatasetReport:
    """A checked annotation file.

    Attributes:
        categories: ``{"id", "name"}``, sorted by id.
        images: entries of the ``images`` section, sorted by id.
        annotations: ``id``, ``image_id``, ``category_id``, ``bbox`` (xywh, floats, inside the
            image), ``area`` and ``iscrowd`` of each annotation kept, in the file's order.
        clipped: number of boxes clipped to their image.
        dropped: number of annotations dropped, since nothing of their box is left.
        filled: number of annotations that lacked ``iscrowd`` or ``area``.
    """

    categories: list[dict[str, Any]]
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    clipped: int
    dropped: int
    filled: int


def check_coco(json: str, images: str) -> DatasetReport:
    """Checks an annotation file and the existence of its images.

    Args:
        json: a COCO-format annotation file.
        images: the folder that its file names are relative to.

    Returns:
        What can be used of it. Repairs are logged in one line.

    Raises:
        DatasetError: the file cannot be used; the message lists every problem with the first ids.
    """
    content = read_json(json)
    path = os.path.abspath(os.path.expanduser(json))
    categories = sorted_categories(content, path)
    entries, annotations = _section(content, "images", path), _section(content, "annotations", path)
    if not entries:
        raise DatasetError(f"{path}: the section 'images' is empty")

    problems = _image_problems(entries)
    if not problems:
        sizes = {e["id"]: (e["width"], e["height"]) for e in entries}
        problems += _missing_files(entries, images)
        problems += _annotation_problems(annotations, sizes, {c["id"] for c in categories})
    if problems:
        raise DatasetError(f"{path} cannot be used:\n" + "\n".join(f"- {p}" for p in problems))

    report = _mend(categories, entries, annotations, sizes)
    if not report.annotations:
        raise DatasetError(f"{path} cannot be used: it holds no box")
    _log(report, path)
    return report


def complete_annotations(annotations: Iterable[dict[str, Any]]) -> int:
    """Fills in ``iscrowd`` and ``area``, without which pycocotools cannot evaluate, in place.

    Args:
        annotations: entries with a ``bbox`` (xywh).

    Returns:
        The number of entries that lacked one of them.
    """
    filled = 0
    for annotation in annotations:
        if "iscrowd" not in annotation or "area" not in annotation:
            filled += 1
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return filled


def _section(content: dict[str, Any], name: str, path: str) -> list[dict[str, Any]]:
    section = content.get(name)
    if not isinstance(section, list) or not all(isinstance(e, dict) for e in section):
        raise DatasetError(f"{path} has no section {name!r} that is a list of objects")
    return section


def _problem(text: str, culprits: Iterable[Any]) -> list[str]:
    """One line for all culprits of a kind, none where there are no culprits."""
    culprits = list(culprits)
    if not culprits:
        return []
    shown = ", ".join(str(c) for c in culprits[:SHOWN])
    more = f", ... ({len(culprits)} in all)" if len(culprits) > SHOWN else ""
    return [f"{text}: {shown}{more}"]


def _select(
    entries: list[dict[str, Any]], is_bad: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    return [entry for entry in entries if is_bad(entry)]


def _names(entries: list[dict[str, Any]]) -> list[str]:
    return [f"id {e['id']}" if "id" in e else f"{str(e)[:60]} (no id)" for e in entries]


def _repeated(entries: list[dict[str, Any]]) -> list[Any]:
    counts = Counter(e["id"] for e in entries if _is_id(e.get("id")))
    return [id_ for id_, count in counts.items() if count > 1]


def _is_id(value: Any) -> bool:
    return type(value) is int or type(value) is str


def _image_problems(entries: list[dict[str, Any]]) -> list[str]:
    problems = _problem(
        "images without an 'id' (a number or a string)",
        _names(_select(entries, lambda e: not _is_id(e.get("id")))),
    )
    if len({type(e.get("id")) for e in entries}) > 1:
        problems += ["some image ids are numbers and others strings"]
    problems += _problem("image ids given more than once", _repeated(entries))
    problems += _problem(
        "images without a 'file_name'",
        _names(_select(entries, lambda e: not isinstance(e.get("file_name"), str))),
    )
    for side in ("width", "height"):
        bad = _select(entries, lambda e: type(e.get(side)) is not int or e[side] < 1)
        problems += _problem(f"images without a positive integer {side!r}", _names(bad))
    return problems


def _missing_files(entries: list[dict[str, Any]], images: str) -> list[str]:
    """Compares with one listing a folder: a look at every file is slow on network drives."""
    root = os.path.abspath(os.path.expanduser(images))
    listings: dict[str, set[str]] = {}
    missing = []
    for entry in entries:
        folder, name = os.path.split(entry["file_name"])
        if folder not in listings:
            listings[folder] = _listing(os.path.join(root, folder))
        if name not in listings[folder]:
            missing.append(f"{entry['file_name']} (id {entry['id']})")
    if missing and not os.path.isdir(root):
        return [f"there is no folder {root} (dataset.train.images / dataset.val.images)"]
    return _problem(f"images that are not in {root}", missing)


def _listing(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError:
        return set()


def _annotation_problems(
    annotations: list[dict[str, Any]], sizes: dict[Any, tuple[int, int]], category_ids: set[int]
) -> list[str]:
    problems = _problem(
        "annotations without an 'id' (a number or a string)",
        _names(_select(annotations, lambda a: not _is_id(a.get("id")))),
    )
    problems += _problem("annotation ids given more than once", _repeated(annotations))
    unplaced = _select(annotations, lambda a: not _is_in(a.get("image_id"), sizes))
    problems += _problem("annotations whose 'image_id' is not among the images", _names(unplaced))
    unknown = _select(annotations, lambda a: not _is_in(a.get("category_id"), category_ids))
    valid = ", ".join(str(i) for i in sorted(category_ids)[:SHOWN])
    more = ", ..." if len(category_ids) > SHOWN else ""
    problems += _problem(
        f"annotations whose 'category_id' is not among the categories ({valid}{more})",
        [f"{name} ({a.get('category_id')!r})" for name, a in zip(_names(unknown), unknown)],
    )
    if not _all_boxes_are_numbers(annotations):
        problems += _problem(
            "annotations whose 'bbox' is not a list of four finite numbers",
            _names(_select(annotations, lambda a: not _is_box(a.get("bbox")))),
        )
    return problems


def _is_in(value: Any, known: Any) -> bool:
    return _is_id(value) and value in known


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(v) in (int, float) for v in box)
        and bool(np.isfinite(np.array(box, dtype=np.float64)).all())
    )


def _all_boxes_are_numbers(annotations: list[dict[str, Any]]) -> bool:
    """The quick answer for the usual case of no fault; ``_is_box`` finds which one it is."""
    boxes = [a.get("bbox") for a in annotations]
    if not boxes:
        return True
    if set(map(type, boxes)) != {list} or set(map(len, boxes)) != {4}:
        return False
    if not set(map(type, chain.from_iterable(boxes))) <= {int, float}:
        return False
    return bool(np.isfinite(np.array(boxes, dtype=np.float64)).all())


def _mend(
    categories: list[dict[str, Any]],
    entries: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    sizes: dict[Any, tuple[int, int]],
) -> DatasetReport:
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    limits = np.array([sizes[a["image_id"]] for a in annotations], np.float64).reshape(-1, 2)
    low = boxes[:, :2].clip(0, limits)
    with np.errstate(over="ignore"):  # finite numbers may add up to infinity, which is clipped too
        high = (boxes[:, :2] + boxes[:, 2:]).clip(0, limits)
    extent = high - low
    keep = (boxes[:, 2:] > 0).all(1) & (extent > 0).all(1)
    moved = np.abs(np.concatenate([low - boxes[:, :2], extent - boxes[:, 2:]], 1)).max(1, initial=0)
    clipped = keep & (moved > CLIP_TOLERANCE)

    kept, filled = [], 0
    for annotation, box, ok in zip(annotations, np.hstack([low, extent]).tolist(), keep.tolist()):
        if not ok:
            continue
        filled += "iscrowd" not in annotation or "area" not in annotation
        kept.append(
            {
                "id": annotation["id"],
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": box,
                "area": annotation.get("area", box[2] * box[3]),
                "iscrowd": int(annotation.get("iscrowd") or 0),
            }
        )
    return DatasetReport(
        categories=categories,
        images=sorted(entries, key=lambda e: e["id"]),
        annotations=kept,
        clipped=int(clipped.sum()),
        dropped=int((~keep).sum()),
        filled=int(filled),
    )


def _log(report: DatasetReport, path: str) -> None:
    names = Counter(c["name"] for c in report.categories)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        logger.warning("%s: several categories are called %s", path, ", ".join(repeated[:SHOWN]))
    if report.clipped or report.dropped or report.filled:
        logger.warning(
            "%s: %d boxes clipped to their image, %d dropped that have no area inside it, "
            "%d annotations given a missing 'iscrowd' (0) or 'area' (that of the box)",
            path,
            report.clipped,
            report.dropped,
            report.filled,
        )
