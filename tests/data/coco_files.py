"""Small COCO-format sets, written for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def annotation(id: int, image_id: int = 1, category_id: int = 1, **others: Any) -> dict[str, Any]:
    """One annotation; a keyword given as None is left out of it."""
    entry = {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [2, 3, 10, 8],
        "area": 70,
        "iscrowd": 0,
        **others,
    }
    return {key: value for key, value in entry.items() if value is not None}


def write_set(
    folder: Path,
    annotations: Sequence[dict[str, Any]],
    sizes: Sequence[tuple[int, int]] = ((40, 30), (30, 50)),
    categories: Sequence[tuple[int, str]] = ((1, "cat"), (2, "dog")),
    **sections: Any,
) -> tuple[str, str]:
    """Writes ``set.json`` and ``images/1.png, ...`` of the given (width, height) under ``folder``.

    Returns:
        The paths of the annotation file and of the images.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images = []
    for i, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i + 1}.png")
        entry = {"id": i + 1, "file_name": f"{i + 1}.png", "width": width, "height": height}
        images.append(entry)
    content = {
        "images": images,
        "annotations": list(annotations),
        "categories": [{"id": id_, "name": name} for id_, name in categories],
        **sections,
    }
    (folder / "set.json").write_text(json.dumps(content))
    return str(folder / "set.json"), str(folder / "images")
