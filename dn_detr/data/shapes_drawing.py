"""The pictures of the shapes data set: drawing, occlusion and clutter (numpy only).

A shape is painted from its signed distance, so that its edges are smooth at any angle.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

CLASSES = ("circle", "square", "triangle", "star", "ring")
MIN_IN_FRAME = 0.6  # part of a shape that lies inside the image
MIN_VISIBLE = 0.4  # part of its in-frame pixels that later shapes leave visible
MIN_CONTRAST = 45  # grey levels between a shape and what it covers, in some channel
TRIES = 40  # placements tried for one shape before it is left out


@dataclass(frozen=True)
class ShapesSpec:
    """Everything that determines the pictures.

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

    ``x`` [1, w] and ``y`` [h, 1] are pixel centres. Squares, triangles and stars are n-pointed
    stars (a regular polygon's inner corners lie on its edges): folding the angle into half a point
    leaves a single edge to measure from.
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
        # From 0 at an inner corner to half at a tip.
        folded = np.abs((np.arctan2(y, x) - angle) % (2 * half) - half)
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
