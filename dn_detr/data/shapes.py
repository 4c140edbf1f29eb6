"""The built-in data set: coloured shapes on cluttered backgrounds, in COCO format.

    python -m dn_detr.data.shapes ./datasets/shapes
    python -m dn_detr.data.shapes ./datasets/dense --size 384 512 --objects 100 150

Every image depends on the seed, its split and its index alone, so the result is the same for any
number of worker processes. Needs numpy and Pillow only.
"""

import argparse
import fcntl
import functools
import json
import logging
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from dn_detr.data.categories import DatasetError
from dn_detr.data.shapes_drawing import CLASSES, ShapesSpec, draw_image

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
SHAPE_SIZE = (0.10, 0.60)  # of the shorter image side, for up to DENSE_FROM objects an image
DENSE_FROM = 6
MIN_PIXELS = 6  # sides below this cannot be told apart
MANIFEST = "shapes.json"
VERSION = 1  # raise it when the pictures change: older sets are then made again


def generate_shapes(
    root: str,
    size: int | Sequence[int] = 128,
    num_train: int = 3000,
    num_val: int = 300,
    classes: Sequence[str] = CLASSES,
    objects: Sequence[int] = (1, 6),
    shape_size: Sequence[float] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> str:
    """Makes the shapes set under ``root``, unless it is there already with the same arguments.

    Layout: ``root/{train,val}/000001.png ...``, ``root/{train,val}.json`` and a manifest. The set
    is made beside ``root`` and moved there when complete, so ``root`` never holds half a set.

    Args:
        root: folder of the set; new, empty, or made by this function before.
        size: side of square images, or (height, width), in pixels, at least 16.
        num_train: number of training images, at least 1.
        num_val: number of validation images, at least 1.
        classes: classes to draw, out of ``CLASSES``.
        objects: (least, most) objects an image; where no place is left, fewer are drawn.
        shape_size: (least, most) side of a shape as a part of the shorter image side; None: 0.1 to
            0.6, and smaller in proportion to ``1 / sqrt(most objects)`` for more than 6 objects.
        seed: seed, 0 or more.
        workers: processes; None: one a usable CPU core.

    Returns:
        ``root``.

    Raises:
        DatasetError: an argument out of range, or a ``root`` that holds other files.
    """
    spec = _spec(size, num_train, num_val, classes, objects, shape_size, seed)
    root = os.path.expanduser(root)
    target = os.path.realpath(root)
    if _is_complete(target, spec):
        return root
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.partial")
    with _lock(partial + ".lock"):
        if _is_complete(target, spec):  # another process made it while this one waited
            return root
        _refuse_foreign_folder(target)
        replaced = partial + ".old"
        leftovers = partial, replaced  # of this call, and of one that was killed
        _remove(leftovers)
        try:
            _write_set(partial, spec, workers or _usable_cores())
            if os.path.exists(target):
                os.rename(target, replaced)
            os.rename(partial, target)
        finally:
            _remove(leftovers)
    return root


def _remove(folders: Iterable[str]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _spec(
    size: int | Sequence[int],
    num_train: int,
    num_val: int,
    classes: Sequence[str],
    objects: Sequence[int],
    shape_size: Sequence[float] | None,
    seed: int,
) -> ShapesSpec:
    height, width = (size, size) if isinstance(size, int) else size
    classes, objects = tuple(classes), tuple(objects)
    unknown = [name for name in classes if name not in CLASSES]
    if unknown or not classes or len(set(classes)) < len(classes):
        raise DatasetError(f"classes={classes}: give each class once, out of {', '.join(CLASSES)}")
    if min(height, width) < 16:
        raise DatasetError(f"size={size}: images need at least 16 pixels a side")
    if num_train < 1 or num_val < 1:
        raise DatasetError(f"num_train={num_train}, num_val={num_val}: each split needs an image")
    if len(objects) != 2 or not 0 <= objects[0] <= objects[1] or objects[1] < 1:
        raise DatasetError(f"objects={objects}: give (least, most), 0 <= least <= most, most >= 1")
    if seed < 0:
        raise DatasetError(f"seed={seed}: must be 0 or more")
    if shape_size is None:
        shrink = min(1.0, math.sqrt(DENSE_FROM / objects[1]))
        least = max(SHAPE_SIZE[0] * shrink, MIN_PIXELS / min(height, width))
        shape_size = (least, max(SHAPE_SIZE[1] * shrink, 2 * least))
    shape_size = tuple(shape_size)
    if len(shape_size) != 2 or not 0 < shape_size[0] <= shape_size[1] <= 1:
        raise DatasetError(f"shape_size={shape_size}: give (least, most), 0 < least <= most <= 1")
    return ShapesSpec(height, width, num_train, num_val, classes, objects, shape_size, seed)


def _manifest(spec: ShapesSpec) -> dict[str, Any]:
    """What the manifest file says, in JSON's types."""
    return json.loads(json.dumps({"version": VERSION, **asdict(spec)}))


def _is_complete(root: str, spec: ShapesSpec) -> bool:
    try:
        with open(os.path.join(root, MANIFEST), encoding="utf-8") as f:
            same = json.load(f) == _manifest(spec)
        counts = [len(os.listdir(os.path.join(root, split))) for split in SPLITS]
    except (OSError, ValueError):
        return False
    annotated = all(os.path.isfile(os.path.join(root, f"{split}.json")) for split in SPLITS)
    return same and annotated and counts == [spec.num_train, spec.num_val]


def _refuse_foreign_folder(root: str) -> None:
    """Only folders that this module made are replaced."""
    if os.path.isdir(root) and not os.listdir(root):
        return
    if os.path.exists(root) and not os.path.isfile(os.path.join(root, MANIFEST)):
        raise DatasetError(
            f"{root} exists and holds no shapes data (no {MANIFEST}): "
            "nothing was touched; give another folder, or remove it"
        )


@contextmanager
def _lock(path: str) -> Iterator[None]:
    """One process at a time; the system frees the lock when its holder dies."""
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _write_set(root: str, spec: ShapesSpec, workers: int) -> None:
    logger.info("Generating %d + %d shapes images ...", spec.num_train, spec.num_val)
    for split, count in zip(SPLITS, (spec.num_train, spec.num_val)):
        os.makedirs(os.path.join(root, split))
        work = functools.partial(_write_image, root, spec, split)
        if workers > 1 and count >= 64:
            # A forked child starts at once and does not run the main script again; it uses only
            # numpy and Pillow, no threads and no device.
            fork = "fork" in multiprocessing.get_all_start_methods()
            with multiprocessing.get_context("fork" if fork else None).Pool(workers) as pool:
                objects = pool.map(work, range(count), chunksize=16)
        else:
            objects = [work(index) for index in range(count)]
        with open(os.path.join(root, f"{split}.json"), "w", encoding="utf-8") as f:
            json.dump(_coco(spec, split, objects), f)
    with open(os.path.join(root, MANIFEST), "w", encoding="utf-8") as f:
        json.dump(_manifest(spec), f)


def _write_image(root: str, spec: ShapesSpec, split: str, index: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng([spec.seed, SPLITS.index(split), index])
    pixels, objects = draw_image(rng, spec)
    path = os.path.join(root, split, _file_name(index))
    Image.fromarray(pixels).save(path, compress_level=1)
    return objects


def _file_name(index: int) -> str:
    return f"{index + 1:06d}.png"


def _coco(spec: ShapesSpec, split: str, objects: list[list[dict[str, Any]]]) -> dict[str, Any]:
    images = [
        {"id": i + 1, "file_name": _file_name(i), "height": spec.height, "width": spec.width}
        for i in range(len(objects))
    ]
    annotations = [
        {"image_id": i + 1, "iscrowd": 0, **annotation}
        for i, of_image in enumerate(objects)
        for annotation in of_image
    ]
    for i, annotation in enumerate(annotations):
        annotation["id"] = i + 1
    return {
        "info": {"description": f"dn_detr shapes, {split}", "arguments": _manifest(spec)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(spec.classes)],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``python -m dn_detr.data.shapes``."""
    parser = argparse.ArgumentParser(description="Makes the shapes data set in COCO format.")
    parser.add_argument("root", help="folder of the set")
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=[128],
        metavar="PIXELS",
        help="side of square images, or height and width (default 128)",
    )
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--num-val", type=int, default=300)
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), choices=CLASSES)
    parser.add_argument("--objects", type=int, nargs=2, default=[1, 6], metavar=("LEAST", "MOST"))
    parser.add_argument(
        "--shape-size",
        type=float,
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="shape side as a part of the shorter image side",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    args = vars(parser.parse_args(argv))
    if len(args["size"]) > 2:
        parser.error("--size takes one or two numbers")
    args["size"] = args["size"][0] if len(args["size"]) == 1 else args["size"]
    try:
        print(generate_shapes(**args))
    except DatasetError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
