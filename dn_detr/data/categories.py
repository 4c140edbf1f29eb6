"""The plain facts of a COCO-format annotation file: its categories and number of images."""

import functools
import json
import os
from collections.abc import Sequence
from typing import Any


class DatasetError(ValueError):
    """A data set that cannot be used as it is; the message names the file and what to do."""


def read_json(path: str) -> dict[str, Any]:
    """Reads an annotation file.

    Args:
        path: a COCO-format JSON file.

    Returns:
        Its content.

    Raises:
        DatasetError: the file is missing, is not JSON, or holds something else than an object.
    """
    resolved = os.path.abspath(os.path.expanduser(path))
    try:
        with open(resolved, encoding="utf-8") as f:
            content = json.load(f)
    except FileNotFoundError as error:
        raise DatasetError(
            f"There is no annotation file {resolved}{_where_to_set(path)}"
        ) from error
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{resolved} is not valid JSON (character {error.pos} of {len(error.doc)}: "
            f"{error.msg}); was it cut off while it was copied?"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{resolved} cannot be read as text: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(
            f"{resolved} holds a {type(content).__name__}, not an object with the sections "
            "'images', 'annotations' and 'categories'"
        )
    return content


def _where_to_set(path: str) -> str:
    folder = os.environ.get("DETECTRON2_DATASETS")
    value = f"is {folder!r}" if folder is not None else "is not set"
    return (
        f" (given as {path!r}; the variable DETECTRON2_DATASETS {value}). Set that variable to the "
        "folder that holds the data sets, or dataset.train.json / dataset.val.json to the file."
    )


def read_categories(path: str) -> list[dict[str, Any]]:
    """The categories of an annotation file.

    Args:
        path: a COCO-format JSON file.

    Returns:
        ``{"id": int, "name": str}`` of each category, sorted by id.

    Raises:
        DatasetError: the file cannot be read, or its categories are missing, malformed or repeated.
    """
    return [{"id": id_, "name": name} for id_, name in _read_summary(path)[0]]


def count_images(path: str) -> int:
    """The number of entries in the ``images`` section of an annotation file.

    Raises:
        DatasetError: the file cannot be read.
    """
    return _read_summary(path)[1]


def _read_summary(path: str) -> tuple[tuple[tuple[int, str], ...], int]:
    resolved = os.path.abspath(os.path.expanduser(path))
    try:
        stat = os.stat(resolved)
    except OSError:
        read_json(path)  # says what is wrong
        raise
    return _cached_summary(resolved, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=16)  # COCO's training file takes seconds to parse
def _cached_summary(path: str, mtime_ns: int, size: int) -> tuple[tuple[tuple[int, str], ...], int]:
    content = read_json(path)
    images = content.get("images")
    if not isinstance(images, list):
        raise DatasetError(f"{path} has no list 'images'")
    categories = sorted_categories(content, path)
    return tuple((c["id"], c["name"]) for c in categories), len(images)


def sorted_categories(content: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """The ``categories`` section as ``{"id", "name"}``, sorted by id.

    Args:
        content: a parsed annotation file.
        path: its path, for the message.

    Raises:
        DatasetError: the section is missing, empty or malformed, or an id is repeated.
    """
    entries = content.get("categories")
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"{path} has no list 'categories', or an empty one")
    for entry in entries:
        well_formed = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        if not well_formed or type(entry.get("id")) is not int or entry["id"] < 0:
            raise DatasetError(
                f"{path}: the category {entry!r} needs an integer 'id' of 0 or more "
                "and a string 'name'"
            )
    ids = [entry["id"] for entry in entries]
    repeated = sorted({id_ for id_ in ids if ids.count(id_) > 1})
    if repeated:
        raise DatasetError(f"{path}: several categories have the id {repeated[:10]}")
    return sorted(({"id": e["id"], "name": e["name"]} for e in entries), key=lambda e: e["id"])


def class_mapping(
    categories: Sequence[dict[str, Any]],
    num_classes: int | None = None,
    source: str = "the annotation file",
) -> tuple[list[str], dict[int, int]]:
    """Which class index the model uses for each category.

    With as many classes as categories (or None), categories are numbered in the order of their
    ids. With ``1 + highest id`` classes, the class is the id itself, and gaps are classes without
    objects: so the published checkpoints count COCO (91 classes for 80 categories).

    Args:
        categories: ``{"id", "name"}`` of each category, sorted by id.
        num_classes: number of classes of the model, or None.
        source: where the categories are from, for the message.

    Returns:
        Class names (a gap is ``"N/A"``), and the class of each category id.

    Raises:
        DatasetError: ``num_classes`` fits neither way of counting.
    """
    ids = [category["id"] for category in categories]
    if num_classes is None or num_classes == len(ids):
        return [c["name"] for c in categories], {id_: i for i, id_ in enumerate(ids)}
    if num_classes == ids[-1] + 1:
        names = {c["id"]: c["name"] for c in categories}
        return [names.get(i, "N/A") for i in range(num_classes)], {id_: id_ for id_ in ids}
    raise DatasetError(
        f"model.num_classes={num_classes}, but {source} has {len(ids)} categories with ids up to "
        f"{ids[-1]}: use model.num_classes={len(ids)} (or null), or {ids[-1] + 1} for classes that "
        "are the category ids"
    )
