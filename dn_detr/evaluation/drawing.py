"""Pictures of detections and of ground truth, with detectron2's Visualizer."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.data.detection_utils import BoxMode  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

SHORTEST_SIDE = 400  # pixels; smaller images are enlarged to this, for the labels to be legible
FONT_SIZE = 9  # points
LINE_HEIGHT, LETTER_WIDTH = 17, 7.6  # pixels of a label of that size
CAPTION_HEIGHT = 26
GAP = 8


@dataclass(frozen=True)
class Objects:
    """What is to be drawn on an image: N boxes.

    Attributes:
        boxes: [N, 4] xyxy in pixels of the image.
        classes: [N] class indices.
        scores: [N] in 0..1, or None (ground truth).
    """

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None


def from_instances(instances, threshold: float) -> Objects:
    """What a model predicts, of at least a score.

    Args:
        instances: detectron2's `Instances` with pred_boxes, scores and pred_classes.
        threshold: the lowest score to keep, 0..1.
    """
    kept = instances[instances.scores >= threshold].to("cpu")
    return Objects(
        kept.pred_boxes.tensor.float().numpy(),
        kept.pred_classes.numpy(),
        kept.scores.float().numpy(),
    )


def from_annotations(annotations: Sequence[dict]) -> Objects:
    """Ground truth, from a detectron2 data set's dict (`annotations`); crowds are left out."""
    objects = [a for a in annotations if not a.get("iscrowd")]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    return Objects(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array([a["category_id"] for a in objects], dtype=np.int64),
    )


def class_color(index: int) -> tuple[float, float, float]:
    """A bright colour, RGB in 0..1, that neighbouring classes do not share."""
    hue = (0.61 + index * 0.6180339887) % 1.0  # the golden ratio spreads any number of hues
    return colorsys.hsv_to_rgb(hue, 0.75, 1.0)


def draw_objects(image: np.ndarray, objects: Objects, class_names: Sequence[str]) -> np.ndarray:
    """Draws boxes with their class names, and scores where there are any.

    Args:
        image: uint8 [H, W, 3], RGB.
        objects: in pixels of `image`.
        class_names: of all classes.

    Returns:
        uint8 [H', W', 3], RGB: enlarged if `image` is smaller than SHORTEST_SIDE.
    """
    try:
        from detectron2.utils.visualizer import Visualizer
    except ImportError as error:
        raise ImportError(
            f"Drawing needs OpenCV, which detectron2 does not install: {error}\n"
            f"    pip install opencv-python-headless"
        ) from error

    enlarged, factor = enlarge(image)
    visualizer = Visualizer(enlarged)
    # Large boxes first: a small one in front of them stays visible.
    order = np.argsort(-np.prod(objects.boxes[:, 2:] - objects.boxes[:, :2], axis=1))
    boxes = objects.boxes[order] * factor
    labels = [_label(objects, i, class_names) for i in order]
    colors = [class_color(int(objects.classes[i])) for i in order]
    for box, color in zip(boxes, colors):
        visualizer.draw_box(box, alpha=0.9, edge_color=color)
    height, width = enlarged.shape[:2]
    for place, label, color in zip(place_labels(boxes, labels, width, height), labels, colors):
        light = tuple(0.5 + 0.5 * part for part in color)  # on the label's dark ground
        visualizer.draw_text(
            label, place, font_size=FONT_SIZE, color=light, horizontal_alignment="left"
        )
    return np.ascontiguousarray(visualizer.output.get_image())


def enlarge(image: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the image enlarged by a whole number to about SHORTEST_SIDE, and that number."""
    factor = max(1, round(SHORTEST_SIDE / min(image.shape[:2])))
    if factor == 1:
        return image, 1
    height, width = image.shape[:2]
    resized = Image.fromarray(image).resize((width * factor, height * factor), Image.BICUBIC)
    return np.asarray(resized), factor


def _label(objects: Objects, index: int, class_names: Sequence[str]) -> str:
    name = class_names[int(objects.classes[index])]
    return name if objects.scores is None else f"{name} {100 * objects.scores[index]:.0f}%"


def place_labels(
    boxes: np.ndarray, labels: Sequence[str], width: int, height: int
) -> list[tuple[float, float]]:
    """Finds a place for every label that hides no other label, if there is one.

    Args:
        boxes: [N, 4] xyxy in pixels of the picture.
        labels: N texts.
        width: of the picture.
        height: of the picture.

    Returns:
        top left corner (x, y) of every label.
    """
    taken: list[tuple[float, float, float, float]] = []
    places = []
    for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels):
        w = LETTER_WIDTH * len(label) + 3
        outside_and_inside = [
            (x0, y0 - LINE_HEIGHT),
            (x0, y1 + 2),
            (x0 + 2, y0 + 2),
            (x1 - w, y0 - LINE_HEIGHT),
            (x1 - w, y1 + 2),
            (x1 + 3, y0),
            (x0 + 2, y1 - LINE_HEIGHT),
            (x0 + 2, (y0 + y1 - LINE_HEIGHT) / 2),
        ]
        fitting = [
            (x, y)
            for x, y in outside_and_inside
            if 0 <= x <= width - w and 0 <= y <= height - LINE_HEIGHT
        ]
        # min keeps the first of equals: the order above is the order of preference.
        clamped = (min(max(x0, 0), max(width - w, 0)), min(max(y0, 0), height - LINE_HEIGHT))
        x, y = min(
            fitting or [clamped],
            key=lambda p: sum(
                _overlap((p[0], p[1], p[0] + w, p[1] + LINE_HEIGHT), t) for t in taken
            ),
        )
        taken.append((x, y, x + w, y + LINE_HEIGHT))
        places.append((x, y))
    return places


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The common area of two boxes xyxy."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def with_caption(picture: np.ndarray, caption: str) -> np.ndarray:
    """Puts a line of text above a picture (uint8 [H, W, 3])."""
    strip = Image.new("RGB", (picture.shape[1], CAPTION_HEIGHT), "white")
    font = ImageFont.load_default(15)
    draw = ImageDraw.Draw(strip)
    while caption and draw.textlength(caption, font=font) > strip.width - 8:
        caption = caption[:-2].rstrip() + "\u2026"
    draw.text((4, 4), caption, fill="black", font=font)
    return np.concatenate([np.asarray(strip), picture])


def in_rows(pictures: Sequence[np.ndarray], columns: int, gap: int = GAP) -> np.ndarray:
    """Lays pictures of any sizes out in rows, on white, none of them cropped.

    Args:
        pictures: each uint8 [H, W, 3].
        columns: pictures in a row.
        gap: pixels between them.

    Returns:
        uint8 [H', W', 3].
    """
    height = max(p.shape[0] for p in pictures) + gap
    width = max(p.shape[1] for p in pictures) + gap
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height, min(columns, len(pictures)) * width, 3), 255, dtype=np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet[: rows * height - gap, : sheet.shape[1] - gap]
