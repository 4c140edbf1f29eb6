"""Augmentation and mapper: boxes stay on their objects, and nothing unusable reaches a model."""

import copy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch  # noqa: E402
from detectron2.data import transforms as T  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402
from PIL import Image  # noqa: E402

from dn_detr.data.augmentation import (  # noqa: E402
    RandomChoice,
    RandomTranspose,
    TransposeTransform,
)
from dn_detr.data.categories import DatasetError  # noqa: E402
from dn_detr.data.datasets import detection_dicts  # noqa: E402
from dn_detr.data.mapper import DetrDatasetMapper  # noqa: E402

from .coco_files import annotation, write_set  # noqa: E402


def bright_box(tmp_path, box=(10, 4, 22, 16), size=(40, 30)):
    """A dark image with one bright box (xyxy), as an entry of ``detection_dicts``."""
    x0, y0, x1, y1 = box
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    Image.fromarray(pixels).save(tmp_path / "box.png")
    return {
        "file_name": str(tmp_path / "box.png"),
        "height": size[1],
        "width": size[0],
        "image_id": 5,
        "annotations": [
            {
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 3,
                "iscrowd": 0,
            }
        ],
    }


def extent(image):
    """xyxy of the bright pixels of a [C, H, W] image."""
    ys, xs = np.nonzero(image.numpy().max(0) > 127)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_the_contract(tmp_path):
    entry = bright_box(tmp_path)
    before = copy.deepcopy(entry)
    result = DetrDatasetMapper(is_train=True)(entry)
    assert entry == before
    assert set(result) == {"file_name", "height", "width", "image_id", "image", "instances"}
    assert result["image"].dtype == torch.uint8 and result["image"].shape == (3, 30, 40)
    assert (result["height"], result["width"], result["image_id"]) == (30, 40, 5)
    instances = result["instances"]
    assert instances.image_size == (30, 40)
    assert instances.gt_boxes.tensor.dtype == torch.float32
    assert instances.gt_boxes.tensor.tolist() == [[10, 4, 22, 16]]
    assert instances.gt_classes.dtype == torch.int64 and instances.gt_classes.tolist() == [3]


def test_evaluation_has_no_instances(tmp_path):
    mapper = DetrDatasetMapper(False, [T.ResizeShortestEdge(60, 1333)])
    result = mapper(bright_box(tmp_path))
    assert set(result) == {"file_name", "height", "width", "image_id", "image"}
    assert result["image"].shape == (3, 60, 80) and result["height"] == 30


def test_channel_order(tmp_path):
    entry = bright_box(tmp_path)
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[..., 0] = 200
    Image.fromarray(pixels).save(entry["file_name"])
    rgb = DetrDatasetMapper(False, image_format="RGB")(entry)["image"]
    bgr = DetrDatasetMapper(False, image_format="BGR")(entry)["image"]
    assert rgb[:, 0, 0].tolist() == [200, 0, 0] and bgr[:, 0, 0].tolist() == [0, 0, 200]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_images_of_other_kinds(tmp_path, mode):
    entry = bright_box(tmp_path)
    image = Image.open(entry["file_name"]).convert(mode)
    entry["file_name"] = str(tmp_path / ("other.tif" if mode == "CMYK" else "other.png"))
    image.save(entry["file_name"])
    assert extent(DetrDatasetMapper(True)(entry)["image"]) == [10, 4, 22, 16]


@pytest.mark.parametrize(
    "augmentation",
    [
        TransposeTransform(),
        T.RandomFlip(prob=1.0),
        T.RandomFlip(prob=1.0, horizontal=False, vertical=True),
        T.AugmentationList([T.RandomFlip(prob=1.0), TransposeTransform()]),
        T.AugmentationList([TransposeTransform(), T.CropTransform(2, 5, 20, 30)]),
    ],
)
def test_boxes_follow_their_pixels(tmp_path, augmentation):
    result = DetrDatasetMapper(True, [augmentation])(bright_box(tmp_path))
    assert result["instances"].gt_boxes.tensor.tolist() == [extent(result["image"])]
    assert result["instances"].image_size == tuple(result["image"].shape[1:])


def test_transposition():
    transform = TransposeTransform()
    image = np.arange(24).reshape(2, 4, 3)
    assert transform.apply_image(image).shape == (4, 2, 3)
    assert (transform.apply_image(image)[3, 1] == image[1, 3]).all()
    assert transform.apply_segmentation(image[..., 0]).shape == (4, 2)
    assert transform.apply_box(np.array([[1, 2, 5, 9]])).tolist() == [[2, 1, 9, 5]]
    assert (transform.inverse().apply_image(transform.apply_image(image)) == image).all()


def test_transposition_is_random():
    np.random.seed(0)
    image = np.zeros((2, 4, 3), np.uint8)
    often = [type(RandomTranspose(0.25).get_transform(image)) for _ in range(400)]
    assert 60 < sum(t is TransposeTransform for t in often) < 140


def test_choice_takes_each_as_often():
    np.random.seed(0)
    choice = RandomChoice([T.Resize((8, 8)), T.AugmentationList([T.Resize((4, 4))]), T.Resize(6)])
    counts = {4: 0, 6: 0, 8: 0}
    for _ in range(300):
        aug_input = T.AugInput(np.zeros((10, 10, 3), np.uint8))
        choice(aug_input)
        counts[aug_input.image.shape[0]] += 1
    assert all(70 < count < 130 for count in counts.values())


def test_detectron2s_crop_is_the_published_one():
    """Sides are independent and uniform over the integers of [384, min(side, 600)]."""
    np.random.seed(0)
    crop = T.RandomCrop("absolute_range", [384, 600])
    drawn = np.array([crop.get_crop_size((388, 700)) for _ in range(4000)])
    assert set(drawn[:, 0]) == {384, 385, 386, 387, 388}
    assert drawn[:, 1].min() == 384 and drawn[:, 1].max() == 600
    assert abs(drawn[:, 1].mean() - 492) < 5
    assert np.bincount(drawn[:, 0])[384:].min() > 700
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.05


def test_crowds_are_removed_and_empty_images_kept(tmp_path):
    crowd, plain = annotation(1, iscrowd=1), annotation(2, 1, 2)
    dicts = detection_dicts(*write_set(tmp_path, [crowd, plain, annotation(3, 2, iscrowd=1)]))
    first, second = (DetrDatasetMapper(True)(d)["instances"] for d in dicts)
    assert first.gt_classes.tolist() == [1]
    assert len(second) == 0 and second.gt_boxes.tensor.shape == (0, 4)
    assert second.gt_classes.dtype == torch.int64 and second.image_size == (50, 30)


def test_boxes_that_a_crop_leaves_out_are_removed(tmp_path):
    entry = bright_box(tmp_path)
    inside = DetrDatasetMapper(True, [T.CropTransform(0, 0, 12, 30)])(entry)["instances"]
    assert inside.gt_boxes.tensor.tolist() == [[10, 4, 12, 16]]
    for crop in (T.CropTransform(0, 0, 10, 30), T.CropTransform(25, 20, 5, 5)):
        outside = DetrDatasetMapper(True, [crop])(entry)["instances"]
        assert len(outside) == 0 and outside.gt_classes.shape == (0,)


def test_absolute_corner_boxes(tmp_path):
    entry = bright_box(tmp_path)
    entry["annotations"].append(
        {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    )
    boxes = DetrDatasetMapper(True)(entry)["instances"].gt_boxes.tensor.tolist()
    assert boxes == [[10, 4, 22, 16], [1, 2, 3, 4]]


def test_orientation_in_exif_is_applied(tmp_path):
    entry = bright_box(tmp_path)
    image = Image.open(entry["file_name"])
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    entry["file_name"] = str(tmp_path / "turned.png")
    image.save(entry["file_name"], exif=exif)
    turned = {**entry, "width": 30, "height": 40}
    assert DetrDatasetMapper(False)(turned)["image"].shape == (3, 40, 30)
    with pytest.raises(DatasetError) as error:
        DetrDatasetMapper(False)(entry)
    for text in (entry["file_name"], "id 5", "is 30x40", "EXIF", "says 40x30"):
        assert text in str(error.value)


def png(entry):
    return Path(entry["file_name"]).read_bytes()


@pytest.mark.parametrize("content", [b"", b"just text", None, "truncated"])
def test_unreadable_images_are_named(tmp_path, content):
    entry = bright_box(tmp_path)
    broken = tmp_path / "broken.png"
    if content == "truncated":
        broken.write_bytes(png(entry)[:60])
    elif content is not None:
        broken.write_bytes(content)
    entry["file_name"] = str(broken)
    with pytest.raises(DatasetError) as error:
        DetrDatasetMapper(True)(entry)
    assert f"The image {broken} (id 5) cannot be read" in str(error.value)
