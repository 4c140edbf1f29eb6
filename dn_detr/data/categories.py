"""The plain facts of a COCO-format annotation file: its categories and number of images."""

import contextlib
import functools
import gc
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dn_detr.data.findings import Finding, as_list, show


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
        with open(resolved, encoding="utf-8") as f, paused_gc():
            content = json.load(f)
    except FileNotFoundError as error:
        raise DatasetError(
            f"There is no annotation file {resolved}{_where_to_set(path)}"
        ) from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"{resolved} is not valid JSON: {_json_fault(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{resolved} cannot be read as text: {error}. It has to be JSON in UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 5000 brackets
        raise DatasetError(f"{resolved} is no annotation file: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(
            f"{resolved} holds a {type(content).__name__}, not an object with the sections "
            "'images', 'annotations' and 'categories'"
        )
    return content


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection: it would look through millions of new entries over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _json_fault(error: json.JSONDecodeError) -> str:
    if not error.doc.strip():
        return f"it is empty ({len(error.doc)} bytes). Copy it again."
    position, size = (len(text.encode()) for text in (error.doc[: error.pos], error.doc))
    if error.pos >= len(error.doc.rstrip()):
        hint = "It ends too early: was it cut off while it was copied?"
    else:
        hint = f"There stands {show(error.doc[error.pos : error.pos + 20])!r}."
    return f"{error.msg} at byte {position} of {size} (line {error.lineno}). {hint}"


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
        raise DatasetError(f"{path} has no section 'images' that is a list")
    categories = sorted_categories(content, path)
    return tuple((c["id"], c["name"]) for c in categories), len(images)


def as_id(value: Any) -> int | str | None:
    """An id that pycocotools can take: an integer (1.0 is one) or a string; None: neither."""
    if type(value) is int or type(value) is str:
        return value
    return int(value) if type(value) is float and value.is_integer() else None


def repeated(values: Sequence[Any]) -> list[Any]:
    """The values that occur more than once, None excepted, each once."""
    counts = Counter(values)
    return [value for value, count in counts.items() if count > 1 and value is not None]


def section(content: dict[str, Any], name: str) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The objects in a section of an annotation file, and what is wrong with the section."""
    entries = content.get(name)
    if name not in content:
        return [], [Finding(f"the section {name!r} is missing (a list of objects)")]
    if not isinstance(entries, list):
        kind = type(entries).__name__
        return [], [Finding(f"the section {name!r} is a {kind}, not a list of objects")]
    strange = [f"number {i} ({show(e)})" for i, e in enumerate(entries) if type(e) is not dict]
    if strange:
        finding = Finding(f"entries of the section {name!r} that are not objects", strange)
        return [e for e in entries if type(e) is dict], [finding]
    empty = [] if entries else [Finding(f"the section {name!r} is empty")]
    return entries, empty


def examine_categories(content: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Checks the ``categories`` section.

    Args:
        content: a parsed annotation file.

    Returns:
        ``{"id": int, "name": str}`` of each category, sorted by id, without the faulty ones; and
        what is wrong: the section is missing or empty, an id or a name is no such, an id is
        repeated.
    """
    entries, findings = section(content, "categories")
    ids = [as_id(entry.get("id")) for entry in entries]
    good = [type(i) is int and i >= 0 and type(e.get("name")) is str for i, e in zip(ids, entries)]
    bad = [show(entry) for entry, ok in zip(entries, good) if not ok]
    if bad:
        text = "categories without an integer 'id' of 0 or more and a string 'name'"
        findings.append(Finding(text, bad))
    twice = repeated(ids)
    if twice:
        findings.append(Finding("category ids given more than once", [show(i) for i in twice]))
    names = {id_: entry["name"] for id_, entry, ok in zip(ids, entries, good) if ok}
    return [{"id": id_, "name": names[id_]} for id_ in sorted(names)], findings


def sorted_categories(content: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """The ``categories`` section as ``{"id", "name"}``, sorted by id.

    Args:
        content: a parsed annotation file.
        path: its path, for the message.

    Raises:
        DatasetError: the section cannot be used, see ``examine_categories``.
    """
    categories, findings = examine_categories(content)
    if findings:
        raise DatasetError(f"{path} cannot be used:\n{as_list(findings)}")
    return categories


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


def class_table(names: Sequence[str], class_of: dict[int, int], shown: int = 12) -> str:
    """Says which class, counted from 0, is which category: ``0: id 3 'cat', 1: id 7 'dog'``.

    Args:
        names: class names, as of ``class_mapping``.
        class_of: the class of each category id.
        shown: number of categories named; the middle ones are left out.
    """
    rows = [f"{index}: id {id_} {show(names[index])!r}" for id_, index in class_of.items()]
    if len(rows) > shown:
        half = shown // 2
        rows[half:-half] = [f"... ({len(rows) - shown} more) ..."]
    return ", ".join(rows)


def unusual_categories(
    categories: Sequence[dict[str, Any]], num_classes: int | None = None
) -> Finding | None:
    """Which class stands for which category, where that is easily taken for another.

    That is so where names are repeated, or ids are not 1, 2, 3, ...

    Args:
        categories: ``{"id", "name"}`` of each category, sorted by id.
        num_classes: number of classes of the model, see ``class_mapping``.

    Returns:
        None: nothing is unusual.

    Raises:
        DatasetError: ``num_classes`` does not fit.
    """
    ids = [category["id"] for category in categories]
    reasons = []
    twice = repeated([category["name"] for category in categories])
    if twice:
        reasons.append(f"several categories are called {', '.join(map(show, twice[:3]))}")
    if ids[0] != 1:
        reasons.append(f"category ids start at {ids[0]}")
    if ids[-1] - ids[0] >= len(ids):
        reasons.append(f"category ids have gaps ({len(ids)} ids up to {ids[-1]})")
    if not reasons:
        return None
    names, class_of = class_mapping(categories, num_classes)
    return Finding(
        f"{'; '.join(reasons)}. class: category is {class_table(names, class_of)}", (), "note"
    )
