"""The ``annotations`` section of a COCO-format file: what is wrong with it, and its repair."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from dn_detr.data.categories import as_id, repeated
from dn_detr.data.findings import SHOWN, Finding, show, show_path

CLIP_TOLERANCE = 0.01  # pixels; below it a box over the edge is a rounding error and not counted
_LARGEST = sys.float_info.max

Annotation = dict[str, Any]


def examine_annotations(
    annotations: list[Annotation],
    file_names: dict[Any, str | None],
    category_ids: set[int] | None,
) -> tuple[list[Annotation], list[Finding]]:
    """Checks the annotations of a file, those of faulty images too.

    Args:
        annotations: the entries of the section.
        file_names: of each image id, the faulty images' included.
        category_ids: None: unknown, and not checked.

    Returns:
        The annotations without fault, in the file's order; and what is wrong with the others.
    """
    findings: list[Finding] = []
    faulty: set[int] = set()

    def find(text: str, key: str, is_bad: Callable[[Any], bool], shows: bool = True) -> None:
        bad = _select([a.get(key) for a in annotations], is_bad)
        if bad:
            names = [_name(annotations[i], i, file_names) for i in bad]
            if shows:
                names = [f"{n} {_value(annotations[i], key)}" for n, i in zip(names, bad)]
            findings.append(Finding(text, names))
            faulty.update(bad)

    find(
        "annotations without an 'id' (a number or a string)",
        *("id", lambda v: as_id(v) is None, False),
    )
    twice = repeated([as_id(a.get("id")) for a in annotations])
    if twice:
        findings.append(Finding("annotation ids given more than once", [show(i) for i in twice]))
    if any(id_ is not None for id_ in file_names):  # else that is fault enough
        find(
            "annotations whose 'image_id' is not among the images",
            *("image_id", lambda v: as_id(v) is None or as_id(v) not in file_names),
        )
    if category_ids is not None:
        valid = ", ".join(str(i) for i in sorted(category_ids)[:SHOWN])
        more = f", ... ({len(category_ids)} in all)" if len(category_ids) > SHOWN else ""
        find(
            f"annotations whose 'category_id' is not among the categories ({valid}{more})",
            *("category_id", lambda v: as_id(v) is None or as_id(v) not in category_ids),
        )
    if not _all_are_boxes(annotations):
        find("annotations whose 'bbox' is not a list of four finite numbers", "bbox", _is_no_box)
    find(
        "annotations whose 'iscrowd' is not 0 or 1",
        *("iscrowd", lambda v: v is not None and v not in (0, 1)),
    )
    find(
        "annotations whose 'area' is not a finite number of 0 or more",
        *("area", lambda v: v is not None and not (_is_number(v) and v >= 0)),
    )
    return [a for i, a in enumerate(annotations) if i not in faulty], findings


def _select(values: list[Any], is_bad: Callable[[Any], bool]) -> list[int]:
    """The positions of bad values; of a million values most are good, and many are equal."""
    try:
        distinct = {value for _, value in set(zip(map(type, values), values)) if is_bad(value)}
    except TypeError:  # lists cannot be put into a set
        distinct = {None}
    return [i for i, value in enumerate(values) if is_bad(value)] if distinct else []


def _name(annotation: Annotation, number: int, file_names: dict[Any, str | None]) -> str:
    """``id 7 (image 3, 3.jpg)``."""
    text = f"number {number} of the section, no id"
    if annotation.get("id") is not None:
        text = f"id {show(annotation['id'])}"
    if "image_id" not in annotation:
        return text
    id_ = as_id(annotation["image_id"])
    file_name = file_names.get(id_) if id_ is not None else None
    file = f", {show_path(file_name)}" if isinstance(file_name, str) else ""
    return f"{text} (image {show(annotation['image_id'])}{file})"


def _value(annotation: Annotation, key: str) -> str:
    if key not in annotation:
        return "has none"
    value = annotation[key]
    if type(value) is list:
        value = [float(f"{v:.7g}") if type(v) is float else v for v in value]
    return f"has {show(repr(value))}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST


def _is_no_box(box: Any) -> bool:
    return not (type(box) is list and len(box) == 4 and all(map(_is_number, box)))


def _all_are_boxes(annotations: list[Annotation]) -> bool:
    """The quick answer for the usual case of no fault; ``_is_no_box`` finds which one it is."""
    boxes = [a.get("bbox") for a in annotations]
    if not boxes:
        return True
    if set(map(type, boxes)) != {list} or set(map(len, boxes)) != {4}:
        return False
    if not set(map(type, chain.from_iterable(boxes))) <= {int, float}:
        return False
    try:
        return bool((np.abs(np.array(boxes, dtype=np.float64)) <= _LARGEST).all())
    except OverflowError:  # an integer of hundreds of digits
        return False


@dataclass(frozen=True)
class Mended:
    """Annotations that can be used, and what was done to them (see ``DatasetReport``)."""

    annotations: list[Annotation]
    clipped: int
    dropped: int
    filled: int
    findings: list[Finding]


def mend(
    annotations: Iterable[Annotation],
    sizes: dict[Any, tuple[int, int]],
    file_names: dict[Any, str | None],
    strict: bool,
) -> Mended:
    """Clips and drops boxes and fills in what may be missing, by the rules of ``check``.

    Args:
        annotations: without fault.
        sizes: (width, height) of each of their images, by id.
        file_names: of each image, by id.
        strict: whether a repair is an error.
    """
    annotations = list(annotations)
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    limits = [sizes[as_id(a["image_id"])] for a in annotations]
    inside, keep = _clip(boxes, np.array(limits, np.float64).reshape(-1, 2))
    clipped = keep & (np.abs(inside - boxes).max(1, initial=0) > CLIP_TOLERANCE)
    lacks = (a.get("iscrowd") is None or a.get("area") is None for a in annotations)
    filled = keep & np.fromiter(lacks, bool, len(annotations))

    findings = []
    for text, repair, mask in (
        ("boxes that reach over the edge of their image", "clipped", clipped),
        ("boxes of which nothing lies inside their image", "dropped", ~keep),
        ("annotations without 'iscrowd' or 'area'", "filled in (0, that of the box)", filled),
    ):
        bad = [annotations[i] for i in np.flatnonzero(mask)]
        if bad:
            names = [f"{_name(a, 0, file_names)} {_value(a, 'bbox')}" for a in bad]
            done = f"not {repair}, since strict" if strict else repair
            level = "error" if strict else "warning"
            findings.append(Finding(f"{text}, {done}", names, level))
    return Mended(
        annotations=[
            _entry(annotation, box)
            for annotation, box, ok in zip(annotations, inside.tolist(), keep.tolist())
            if ok
        ],
        clipped=int(clipped.sum()),
        dropped=int((~keep).sum()),
        filled=int(filled.sum()),
        findings=findings,
    )


def _clip(boxes: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """xywh boxes clipped to (width, height), [N, 4], and which of them have an area, [N]."""
    low = boxes[:, :2].clip(0, limits)
    with np.errstate(over="ignore"):  # finite numbers may add up to infinity, which is clipped too
        extent = (boxes[:, :2] + boxes[:, 2:]).clip(0, limits) - low
    return np.hstack([low, extent]), (boxes[:, 2:] > 0).all(1) & (extent > 0).all(1)


def _entry(annotation: Annotation, box: list[float]) -> Annotation:
    area = annotation.get("area")
    return {
        "id": as_id(annotation["id"]),
        "image_id": as_id(annotation["image_id"]),
        "category_id": as_id(annotation["category_id"]),
        "bbox": box,
        "area": box[2] * box[3] if area is None else area,
        "iscrowd": int(annotation.get("iscrowd") or 0),
    }
