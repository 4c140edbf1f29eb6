"""Pictures of boxes: what is drawn, and where its label goes."""

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.structures import Boxes, BoxMode, Instances

from dn_detr.evaluation.drawing import (
    LETTER_WIDTH,
    LINE_HEIGHT,
    SHORTEST_SIDE,
    Objects,
    class_color,
    draw_objects,
    enlarge,
    from_annotations,
    from_instances,
    in_rows,
    place_labels,
    with_caption,
)

NAMES = ["circle", "square"]


def objects(*boxes: tuple[float, ...], scores: list[float] | None = None) -> Objects:
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return Objects(
        array, np.zeros(len(array), dtype=np.int64), None if scores is None else np.array(scores)
    )


def rectangles(places: list, labels: list[str]) -> np.ndarray:
    return np.array(
        [(x, y, x + LETTER_WIDTH * len(s), y + LINE_HEIGHT) for (x, y), s in zip(places, labels)]
    )


def test_predictions_below_the_threshold_are_left_out() -> None:
    instances = Instances((20, 30))
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 5, 5], [1, 1, 9, 9]]))
    instances.scores = torch.tensor([0.7, 0.3])
    instances.pred_classes = torch.tensor([1, 0])
    kept = from_instances(instances, 0.5)
    assert kept.boxes.tolist() == [[0, 0, 5, 5]]
    assert kept.classes.tolist() == [1]
    assert kept.scores == pytest.approx([0.7])


def test_ground_truth_is_xyxy_and_without_crowds() -> None:
    box = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    truth = from_annotations([box, {**box, "iscrowd": 1}])
    assert truth.boxes.tolist() == [[1, 2, 4, 6]]
    assert truth.classes.tolist() == [1]
    assert from_annotations([]).boxes.shape == (0, 4)


def test_small_images_are_enlarged_and_boxes_with_them() -> None:
    image = np.zeros((100, 130, 3), dtype=np.uint8)
    picture = draw_objects(image, objects((50, 50, 90, 90)), NAMES)
    assert picture.shape == (SHORTEST_SIDE, SHORTEST_SIDE * 130 // 100, 3)
    is_line = abs(picture / 255 - np.array(class_color(0))).sum(-1) < 0.5
    rows, columns = np.nonzero(is_line)
    assert abs(columns.min() - 200) < 4 and abs(columns.max() - 360) < 4
    assert abs(rows.max() - 360) < 4
    # The sides stand where they belong; the label is within them or above.
    assert is_line[210:350, 199:202].any(axis=1).all()
    assert not is_line[220:340, 210:350].any()


def test_large_images_keep_their_size_and_nothing_is_drawn_for_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    assert enlarge(image)[1] == 1
    assert np.array_equal(draw_objects(image, objects(), NAMES), image)


def test_labels_do_not_hide_each_other() -> None:
    """Boxes on one another, along the edges, and tiny ones."""
    boxes = np.array([[100, 100, 200, 200]] * 4 + [[0, 0, 40, 40], [380, 380, 400, 400]])
    labels = ["square 91%"] * len(boxes)
    placed = rectangles(place_labels(boxes, labels, 400, 400), labels)
    assert (placed >= 0).all() and (placed <= 400).all()
    for i, a in enumerate(placed):
        for b in placed[:i]:
            apart = (a[:2] >= b[2:]).any() or (b[:2] >= a[2:]).any()
            assert apart, (a, b)


def test_a_label_stands_above_its_box_if_it_can() -> None:
    assert place_labels(np.array([[50, 60, 90, 90]]), ["ring"], 400, 400) == [
        (50, 60 - LINE_HEIGHT)
    ]


def test_a_label_that_fits_nowhere_stays_in_the_picture() -> None:
    ((x, y),) = place_labels(np.array([[0, 0, 20, 20]]), ["a name longer than that"], 60, 20)
    assert x == 0 and 0 <= y <= 20 - LINE_HEIGHT


def test_classes_have_colours_of_their_own() -> None:
    colors = np.array([class_color(i) for i in range(20)])
    assert colors.max() <= 1 and colors.min() >= 0
    near = abs(colors[:, None] - colors[None]).sum(-1) + 9 * np.eye(20)
    assert near[:6, :6].min() > 0.3 and near.min() > 0.05


def test_pictures_of_any_size_are_laid_out_whole() -> None:
    pictures = [np.full((10 + i, 20 - i, 3), i, dtype=np.uint8) for i in range(3)]
    sheet = in_rows(pictures, columns=2, gap=4)
    assert sheet.shape == (12 + 4 + 12, 20 + 4 + 20, 3)
    for i, picture in enumerate(pictures):
        assert (sheet == i).all(-1).sum() == picture.shape[0] * picture.shape[1]
    assert in_rows(pictures[:1], columns=2).shape == pictures[0].shape


def test_a_caption_is_cut_to_the_width_of_its_picture() -> None:
    picture = np.zeros((30, 100, 3), dtype=np.uint8)
    captioned = with_caption(picture, "a very long name of a file.png: ground truth (3)")
    assert captioned.shape[1] == 100 and captioned.shape[0] > 30
    assert (captioned[-30:] == 0).all()
    assert (captioned[:-30, -4:] == 255).all()  # nothing runs into the right edge
