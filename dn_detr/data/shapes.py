"""The built-in data set: coloured shapes on cluttered backgrounds, in COCO format.

    python -m dn_detr.data.shapes ./datasets/shapes
    python -m dn_detr.data.shapes ./datasets/dense --size 384 512 --objects 100 150

Every image depends on the seed, its split and its index alone, so the result is the same for any number
of worker processes. Needs numpy and Pillow only.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

CLASSES = ("circle", "square", "triangle", "star", "ring")
SPLITS = ("train", "val")
SHAPE_SIZE = (0.10, 0.60)  # of the shorter image side, for up to DENSE_FROM objects an image
DENSE_FROM = 6
MIN_PIXELS = 6  # sides below this cannot be told apart
MIN_IN_FRAME = 0.6  # part of a shape that lies inside the image
MIN_VISIBLE = 0.4  # part of its in-frame pixels that later shapes leave visible
MIN_CONTRAST = 45  # grey levels between a shape and what it covers, in some channel
TRIES = 40  # placements tried for one shape before it is left out
VERSION = 1  # raise it when the pictures change: older caches are then made again
MANIFEST = "shapes.json"


@dataclass(frozen=True)
class ShapesSpec:
    """Everything that determines the pictures (compared with the manifest on disk).

    Attributes:
        height, width: image size in pixels.
        num_train, num_val: images in each split.
        classes: names out of ``CLASSES``; category ids count from 1 in this order.
        objects: (least, most) objects an image, both included.
        shape_size: (least, most) shape side as a part of the shorter image side.
        seed: seed of the whole set, 0 or more.
    """

    height: int
    width: int
    num_train: int
    num_val: int
    classes: tuple[str, ...]
    objects: tuple[int, int]
    shape_size: tuple[float, float]
    seed: int

    def manifest(self) -> dict[str, Any]:
        """The content of the manifest file, in JSON's types."""
        return json.loads(json.dumps({"version": VERSION, **asdict(self)}))


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

    Layout: ``root/{train,val}/000001.png ...``, ``root/{train,val}.json`` and a manifest. Images are
    rendered beside ``root`` and moved there when complete, so what is at ``root`` is never half a set.

    Args:
        root: folder of the set; new, empty, or made by this function before.
        size: side of square images, or (height, width), in pixels, at least 16.
        num_train: number of training images, at least 1.
        num_val: number of validation images, at least 1.
        classes: classes to draw, out of ``CLASSES``.
        objects: (least, most) objects an image; where no place is left, fewer are drawn.
        shape_size: (least, most) side of a shape as a part of the shorter image side; None: 0.1 to 0.6,
            and smaller in proportion to ``1 / sqrt(most objects)`` for more than 6 objects.
        seed: seed, 0 or more.
        workers: processes; None: one a usable CPU core.

    Returns:
        ``root``.

    Raises:
        ValueError: an argument out of range, or a ``root`` that holds other files.
    """
    spec = _spec(size, num_train, num_val, classes, objects, shape_size, seed)
    root = os.path.expanduser(root)
    target = os.path.abspath(root)
    if _is_complete(target, spec):
        return root
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.partial")
    with _lock(partial + ".lock"):
        if _is_complete(target, spec):  # another process made it while this one waited
            return root
        _refuse_foreign_folder(target)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write_set(partial, spec, workers or _usable_cores())
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return root


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
        raise ValueError(f"classes={classes}: give each class once, out of {', '.join(CLASSES)}")
    if min(height, width) < 16:
        raise ValueError(f"size={size}: images need at least 16 pixels a side")
    if num_train < 1 or num_val < 1:
        raise ValueError(f"num_train={num_train}, num_val={num_val}: each split needs an image")
    if len(objects) != 2 or not 0 <= objects[0] <= objects[1] or objects[1] < 1:
        raise ValueError(f"objects={objects}: give (least, most) with 0 <= least <= most, most >= 1")
    if seed < 0:
        raise ValueError(f"seed={seed}: must be 0 or more")
    if shape_size is None:
        shrink = min(1.0, math.sqrt(DENSE_FROM / objects[1]))
        least = max(SHAPE_SIZE[0] * shrink, MIN_PIXELS / min(height, width))
        shape_size = (least, max(SHAPE_SIZE[1] * shrink, 2 * least))
    shape_size = tuple(shape_size)
    if len(shape_size) != 2 or not 0 < shape_size[0] <= shape_size[1] <= 1:
        raise ValueError(f"shape_size={shape_size}: give (least, most), 0 < least <= most <= 1")
    return ShapesSpec(height, width, num_train, num_val, classes, objects, shape_size, seed)


def _is_complete(root: str, spec: ShapesSpec) -> bool:
    try:
        with open(os.path.join(root, MANIFEST), encoding="utf-8") as f:
            same = json.load(f) == spec.manifest()
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
        raise ValueError(
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
        json.dump(spec.manifest(), f)


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
        "info": {"description": f"dn_detr shapes, {split}", "arguments": spec.manifest()},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(spec.classes)],
    }


@dataclass
class _Shape:
    kind: str
    window: tuple[slice, slice]  # rows and columns that hold all of its in-frame pixels
    whole: int  # in-frame pixels when it was drawn
    visible: int  # of these, not covered since


def draw_image(
    rng: np.random.Generator, spec: ShapesSpec
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draws one image.

    Returns:
        Pixels, uint8 [H, W, 3], and for each object ``category_id``, ``bbox`` (xywh of the visible
        extent, pixels) and ``area`` (visible pixels).
    """
    image = _background(rng, spec.height, spec.width)
    owner = np.full((spec.height, spec.width), -1, np.int32)  # which shape a pixel shows
    shapes: list[_Shape] = []
    for _ in range(rng.integers(spec.objects[0], spec.objects[1] + 1)):
        for _ in range(TRIES):
            kind = spec.classes[rng.integers(len(spec.classes))]
            if _place(rng, spec.shape_size, kind, image, owner, shapes):
                break
    image += rng.uniform(4, 16) * rng.standard_normal(image.shape, np.float32)
    objects = [
        {
            "category_id": spec.classes.index(shape.kind) + 1,
            "bbox": _extent(owner[shape.window] == index, shape.window),
            "area": shape.visible,
        }
        for index, shape in enumerate(shapes)
    ]
    return np.clip(image, 0, 255).astype(np.uint8), objects


def _place(
    rng: np.random.Generator,
    shape_size: tuple[float, float],
    kind: str,
    image: np.ndarray,
    owner: np.ndarray,
    shapes: list[_Shape],
) -> bool:
    """Paints one shape at a random place, unless the frame would cut it or it would hide others.

    Args:
        shape_size: (least, most) side as a part of the shorter image side.
        kind: the shape's class.
        image: float32 [H, W, 3], painted in place.
        owner: int32 [H, W], the index of the shape that each pixel shows or -1, updated in place.
        shapes: the shapes drawn before; this one is appended.

    Returns:
        Whether it was painted.
    """
    height, width = owner.shape
    side = min(height, width) * math.exp(rng.uniform(*np.log(shape_size)))
    radius = side * (0.6 if kind == "square" else 0.5)
    angle = rng.uniform(0, 2 * math.pi)
    center_x = rng.uniform(0.35 * side, width - 0.35 * side)
    center_y = rng.uniform(0.35 * side, height - 0.35 * side)

    # A window round the shape, which may reach over the frame.
    x0, y0 = math.floor(center_x - radius) - 1, math.floor(center_y - radius) - 1
    x1, y1 = math.ceil(center_x + radius) + 1, math.ceil(center_y + radius) + 1
    x = np.arange(x0, x1, dtype=np.float32)[None] + np.float32(0.5 - center_x)
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - center_y)
    alpha = _coverage(kind, x, y, radius, angle)
    total = int((alpha > 0.5).sum())
    inside = slice(max(-y0, 0), height - y0), slice(max(-x0, 0), width - x0)
    window = slice(max(y0, 0), y1), slice(max(x0, 0), x1)
    alpha = alpha[inside]
    mask = alpha > 0.5
    whole = int(mask.sum())
    if whole == 0 or whole < MIN_IN_FRAME * total:
        return False

    covered = np.bincount(owner[window][mask] + 1, minlength=len(shapes) + 1)[1:]
    if any(s.visible - lost < MIN_VISIBLE * s.whole for s, lost in zip(shapes, covered) if lost):
        return False
    for shape, lost in zip(shapes, covered):
        shape.visible -= int(lost)
    color = _contrasting_color(rng, image[window][mask].mean(0))
    owner[window][mask] = len(shapes)
    shapes.append(_Shape(kind, window, whole, whole))
    ramp = (x * math.cos(angle) + y * math.sin(angle))[inside] / radius
    shade = 1 + 0.25 * rng.uniform(-1, 1) * ramp
    patch = image[window]
    patch += alpha[..., None] * (shade[..., None] * color - patch)
    return True


def _coverage(kind: str, x: np.ndarray, y: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """How much of each pixel a shape centred on the origin covers, 0 to 1, from signed distances.

    ``x`` [1, w] and ``y`` [h, 1] are pixel centres. Squares, triangles and stars are n-pointed stars
    (a regular polygon's inner corners lie on its edges): folding the angle into half a point leaves a
    single edge to measure from.
    """
    rho = np.hypot(x, y)
    if kind == "circle":
        distance = rho - radius
    elif kind == "ring":
        distance = np.abs(rho - 0.78 * radius) - 0.22 * radius
    else:
        points = {"triangle": 3, "square": 4, "star": 5}[kind]
        half = math.pi / points
        inner = radius * (0.45 if kind == "star" else math.cos(half))
        folded = np.abs((np.arctan2(y, x) - angle) % (2 * half) - half)  # 0: inner corner, half: tip
        along, across = rho * np.cos(folded), rho * np.sin(folded)
        edge_x, edge_y = radius * math.cos(half) - inner, radius * math.sin(half)
        distance = ((along - inner) * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)
    return np.clip(0.5 - distance, 0, 1)


def _contrasting_color(rng: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    for _ in range(20):
        color = rng.uniform(0, 255, 3).astype(np.float32)
        if np.abs(color - behind).max() > MIN_CONTRAST:
            break
    return color


def _extent(visible: np.ndarray, window: tuple[slice, slice]) -> list[int]:
    """Box (xywh, pixels of the image) of a mask that shows the image's ``window``."""
    columns, rows = np.flatnonzero(visible.any(0)), np.flatnonzero(visible.any(1))
    x, y = int(columns[0]), int(rows[0])
    size = [int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    return [window[1].start + x, window[0].start + y, *size]


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A base colour, coarse to fine colour noise and up to three lines, float32 [H, W, 3]."""
    image = np.empty((height, width, 3), np.float32)
    image[:] = rng.uniform(40, 215, 3)
    for cells, strength in ((2, 30), (6, 14), (20, 8)):
        grid = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        image += _stretch(_stretch(grid, height).swapaxes(0, 1), width).swapaxes(0, 1)
    x = np.arange(width, dtype=np.float32)[None] + 0.5
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5
    for _ in range(rng.integers(0, 4)):
        angle, through_x, through_y = rng.uniform(0, (math.pi, width, height))
        distance = np.abs((x - through_x) * math.sin(angle) - (y - through_y) * math.cos(angle))
        alpha = np.clip(0.5 + rng.uniform(0.5, 1.5) - distance, 0, 1) * rng.uniform(0.4, 1)
        image += alpha[..., None] * (rng.uniform(0, 255, 3) - image)
    return image


def _stretch(grid: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation of axis 0 to ``length``, corners on corners."""
    position = np.linspace(0, len(grid) - 1, length, dtype=np.float32)
    low = np.minimum(position.astype(int), len(grid) - 2)
    weight = (position - low)[:, None, None]
    return grid[low] * (1 - weight) + grid[low + 1] * weight


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``python -m dn_detr.data.shapes``."""
    parser = argparse.ArgumentParser(description="Makes the shapes data set in COCO format.")
    parser.add_argument("root", help="folder of the set")
    parser.add_argument("--size", type=int, nargs="+", default=[128], metavar="PIXELS",
                        help="side of square images, or height and width (default 128)")
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--num-val", type=int, default=300)
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), choices=CLASSES)
    parser.add_argument("--objects", type=int, nargs=2, default=[1, 6], metavar=("LEAST", "MOST"))
    parser.add_argument("--shape-size", type=float, nargs=2, metavar=("LEAST", "MOST"),
                        help="shape side as a part of the shorter image side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    args = vars(parser.parse_args(argv))
    if len(args["size"]) > 2:
        parser.error("--size takes one or two numbers")
    args["size"] = args["size"][0] if len(args["size"]) == 1 else args["size"]
    try:
        print(generate_shapes(**args))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
