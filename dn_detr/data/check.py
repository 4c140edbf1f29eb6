"""One pass over a COCO-format annotation file before it is used.

What cannot be used is an error; all errors of a file are collected and reported at once, each with
the first culprits and the total. What can be mended is mended by these rules and counted:

- A box is clipped to its image. It is dropped where nothing of it is left: width or height of zero
  or less, before or after clipping.
- ``iscrowd`` is 0 and ``area`` is the area of the clipped box where they are missing or null.

With ``strict`` nothing is mended: what would be is an error.

Ids may be integers (1.0 is one) or strings, and need not be in order; a width or height may be
640.0. Images are looked up in the listings of their folders, and not opened.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dn_detr.data.annotations import examine_annotations, mend
from dn_detr.data.categories import (
    DatasetError,
    as_id,
    examine_categories,
    paused_gc,
    read_json,
    repeated,
    section,
)
from dn_detr.data.findings import Finding, as_list, only, show, show_path

logger = logging.getLogger(__name__)

LARGEST_SIDE = 2**31 - 1  # of an image; Pillow's own limit
_logged: set[str] = set()


@dataclass(frozen=True)
class DatasetReport:
    """A checked annotation file.

    Attributes:
        path: of the file, absolute.
        categories: ``{"id", "name"}``, sorted by id.
        images: entries of the ``images`` section that can be used, sorted by id.
        annotations: ``id``, ``image_id``, ``category_id``, ``bbox`` (xywh, floats, inside the
            image), ``area`` and ``iscrowd`` of each annotation that can be used, in the file's
            order.
        findings: what is wrong, and what was mended.
        clipped: number of boxes clipped to their image.
        dropped: number of annotations dropped, since nothing of their box is left.
        filled: number of annotations that lacked ``iscrowd`` or ``area``.
    """

    path: str
    categories: list[dict[str, Any]]
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    findings: list[Finding]
    clipped: int
    dropped: int
    filled: int


def check_coco(json: str, images: str, strict: bool = False) -> DatasetReport:
    """Checks an annotation file and the existence of its images.

    Args:
        json: a COCO-format annotation file.
        images: the folder that its file names are relative to.
        strict: mend nothing.

    Returns:
        What can be used of it. Repairs are logged as one warning, once in a process.

    Raises:
        DatasetError: the file cannot be used; the message lists every problem with the first ids.
    """
    report = examine_coco(json, images, strict)
    errors = only(report.findings, "error")
    if errors:
        raise DatasetError(
            f"{report.path} cannot be used:\n{as_list(errors)}\n"
            "Correct or remove these entries; tools/check_dataset.py lists all of them."
        )
    warnings = only(report.findings, "warning")
    if warnings:
        log_once(
            f"{report.path} is used with repairs (evaluation takes boxes as they are in the file):"
            f"\n{as_list(warnings)}"
        )
    return report


def log_once(message: str) -> None:
    """Logs a warning, unless this process did so before: a set is read for every evaluation."""
    if message not in _logged:
        _logged.add(message)
        logger.warning("%s", message)


def examine_coco(json: str, images: str, strict: bool = False) -> DatasetReport:
    """As ``check_coco``, but what is wrong is in the report's ``findings``.

    Raises:
        DatasetError: the file is missing, or is no JSON object.
    """
    content = read_json(json)
    path = os.path.abspath(os.path.expanduser(json))
    with paused_gc():
        categories, findings = examine_categories(content)
        # Where categories are faulty, nobody knows which ids are.
        category_ids = None if findings else {c["id"] for c in categories}
        entries, faults = section(content, "images")
        findings += faults
        usable, faults = _examine_images(entries)
        findings += faults + _examine_files(entries, images)

        annotations, faults = section(content, "annotations")
        findings += faults
        names = {as_id(e.get("id")): e.get("file_name") for e in entries}
        good, faults = examine_annotations(annotations, names, category_ids)
        findings += faults
        sizes = {e["id"]: (e["width"], e["height"]) for e in usable}
        mended = mend((a for a in good if as_id(a["image_id"]) in sizes), sizes, names, strict)
    if not mended.annotations and not only(findings, "error"):
        findings.append(Finding("it holds no box that can be used"))
    return DatasetReport(
        path=path,
        categories=categories,
        images=usable,
        annotations=mended.annotations,
        findings=findings + mended.findings,
        clipped=mended.clipped,
        dropped=mended.dropped,
        filled=mended.filled,
    )


def complete_annotations(annotations: Iterable[dict[str, Any]]) -> int:
    """Fills in ``iscrowd`` and ``area``, without which pycocotools cannot evaluate, in place.

    Args:
        annotations: entries with a ``bbox`` (xywh).

    Returns:
        The number of entries that lacked one of them, or had null.
    """
    filled = 0
    for annotation in annotations:
        if annotation.get("iscrowd") is None or annotation.get("area") is None:
            filled += 1
            annotation["iscrowd"] = annotation.get("iscrowd") or 0
            if annotation.get("area") is None:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    return filled


def _side(value: Any) -> int | None:
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 1 <= value <= LARGEST_SIDE else None


def _name(entry: dict[str, Any], number: int) -> str:
    id_ = f"id {show(entry['id'])}" if "id" in entry else f"number {number} of the section, no id"
    file_name = entry.get("file_name")
    return f"{id_} ({show_path(file_name)})" if isinstance(file_name, str) else id_


def _examine_images(entries: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The entries that can be used, sorted by id, and what is wrong with the others."""
    faults: dict[str, list[str]] = defaultdict(list)
    ids = [as_id(entry.get("id")) for entry in entries]
    usable = {}
    for number, (entry, id_) in enumerate(zip(entries, ids)):
        sides = [_side(entry.get(side)) for side in ("width", "height")]
        kinds = []
        if id_ is None:
            kinds.append("images without an 'id' (a number or a string)")
        if type(entry.get("file_name")) is not str:
            kinds.append("images without a 'file_name'")
        for side, value in zip(("width", "height"), sides):
            if value is None:
                kinds.append(f"images without a positive integer {side!r}")
        for kind in kinds:
            faults[kind].append(_name(entry, number))
        if not kinds:
            usable[id_] = {**entry, "id": id_, "width": sides[0], "height": sides[1]}
    findings = [Finding(kind, culprits) for kind, culprits in faults.items()]
    twice = repeated(ids)
    if twice:
        findings.append(Finding("image ids given more than once", [show(i) for i in twice]))
    if {int, str} <= set(map(type, ids)):
        findings.append(Finding("some image ids are numbers and others strings"))
    order = sorted(usable, key=lambda id_: (type(id_) is str, id_))
    return [usable[id_] for id_ in order], findings


def _examine_files(entries: list[dict[str, Any]], images: str) -> list[Finding]:
    """Compares with one listing a folder: a look at every file is slow on network drives."""
    root = os.path.abspath(os.path.expanduser(images))
    listings: dict[str, set[str] | None] = {}
    missing, outside, users = [], [], defaultdict(list)
    for number, entry in enumerate(entries):
        if type(entry.get("file_name")) is not str:
            continue
        folder, name = os.path.split(entry["file_name"])
        if folder not in listings:
            listings[folder] = _listing(root, folder)
        listing = listings[folder]
        if listing is None:
            outside.append(_name(entry, number))
        elif name not in listing:
            missing.append(_name(entry, number))
        users[entry["file_name"]].append(entry.get("id"))
    if missing and not os.path.isdir(root):
        return [Finding(f"there is no folder {root} (dataset.train.images / dataset.val.images)")]
    shared = [
        f"{show_path(f)} (ids {', '.join(map(show, i))})" for f, i in users.items() if len(i) > 1
    ]
    findings = [
        Finding(f"images that are not in {root}", missing),
        Finding(f"images whose 'file_name' leads outside {root}", outside),
        Finding("files that several images share", shared, "warning"),
    ]
    return [finding for finding in findings if finding.culprits]


def _listing(root: str, folder: str) -> set[str] | None:
    """The files in a folder below the root; None: it leads elsewhere by ``..`` or from ``/``.

    Links are followed: an image folder may be one, or hold some.
    """
    path = os.path.join(root, folder)
    try:
        if os.path.isabs(folder) or os.pardir in folder.split(os.sep):
            inside = os.path.realpath(root)
            if os.path.commonpath([inside, os.path.realpath(path)]) != inside:
                return None
        with os.scandir(path) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # ValueError: a null character, half a surrogate pair
        return set()
