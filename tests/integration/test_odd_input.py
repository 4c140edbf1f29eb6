"""Odd but legal data: it passes the check, trains and evaluates."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.config import instantiate  # noqa: E402
from detectron2.data import transforms as T  # noqa: E402
from detectron2.engine import default_argument_parser  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

from dn_detr.data.augmentation import ResizeShortestEdge  # noqa: E402
from dn_detr.engine.config import load_config  # noqa: E402
from dn_detr.engine.main import main  # noqa: E402
from tests.data.coco_files import annotation  # noqa: E402
from tests.meta_arch.small import FAMILIES, small_config  # noqa: E402

CONFIG = str(Path(__file__).parents[1] / "data" / "odd_config.py")
LONG_NAME = "ü" * 125 + ".png"  # 254 bytes of the 255 that a name may have
DEEP = "/".join(["d" * 200] * 16)
SHAPES = {"pixel.png": (1, 1), "tall.png": (1, 5000), "wide.png": (5000, 1)}  # width, height
MODES = ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I")


def save_images(folder):
    """Writes the images; returns the (width, height) of each file as seen."""
    rng = np.random.default_rng(0)
    (folder / DEEP).mkdir(parents=True)
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (folder / "link").symlink_to(elsewhere)

    def pixels(width, height):
        return rng.integers(0, 256, (height, width, 3), np.uint8)

    sizes = {}
    for mode in MODES:
        name = f"{mode.replace(';', '')}.{'tif' if mode in ('CMYK', 'I') else 'png'}"
        if mode.startswith("I"):
            values = pixels(40, 30)[..., 0] * np.uint16(257)
            image = Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
        else:
            image = Image.fromarray(pixels(40, 30)).convert(mode)
        assert image.mode == mode
        image.save(folder / name)
        sizes[name] = (40, 30)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels(40, 30)).save(folder / "turned.jpg", exif=exif)
    sizes["turned.jpg"] = (30, 40)
    others = ("none.png", "crowded.png", "图像 ñ%20.png", LONG_NAME, f"{DEEP}/a.png", "link/a.png")
    for name, size in {**SHAPES, **dict.fromkeys(others, (40, 30))}.items():
        Image.fromarray(pixels(*size)).save(folder / name)
        sizes[name] = size
    return sizes


def odd_set(folder):
    """Ids with gaps, from 0; two categories of one name; a box a pixel in size, and a thousand."""
    (folder / "images").mkdir()
    sizes = save_images(folder / "images")
    images, annotations = [], []
    for image_id, (name, (width, height)) in enumerate(sizes.items()):
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        count = {"none.png": 0, "crowded.png": 1000}.get(name, 1)
        for i in range(count):
            box = [i % 30 * width / 40, i % 20 * height / 30, width / 4, height / 3]
            category = (0, 7, 9)[(image_id + i) % 3]
            annotations.append(
                annotation(len(annotations), image_id, category, bbox=box, area=box[2] * box[3])
            )
    categories = [{"id": 0, "name": "cat"}, {"id": 7, "name": "cat"}, {"id": 9, "name": "狗"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(content))
    return [
        f"dataset.{split}.{key}={folder / value}"
        for split in ("train", "val")
        for key, value in (("json", "set.json"), ("images", "images"))
    ]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    return odd_set(tmp_path_factory.mktemp("odd"))


@pytest.mark.fault(42)
@pytest.mark.fault(46)
@pytest.mark.fault(48)
def test_odd_input_trains_and_evaluates(overrides, tmp_path):
    options = ["--config-file", CONFIG, *overrides, f"train.output_dir={tmp_path}"]
    results = main(default_argument_parser().parse_args(options))
    assert math.isfinite(results["bbox"]["AP"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = [row["total_loss"] for row in rows if "total_loss" in row]
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    log = (tmp_path / "log.txt").read_text()
    assert log.count("0: id 0 'cat', 1: id 7 'cat', 2: id 9 '狗'") == 1
    assert (
        "several categories are called cat; category ids start at 0; category ids have gaps" in log
    )
    predictions = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert {p["image_id"] for p in predictions} == set(range(len(MODES) + 10))


@pytest.mark.parametrize("kind", [str, float])
def test_ids_may_be_texts_or_whole_floats(overrides, tmp_path, kind):
    content = json.loads(Path(overrides[0].partition("=")[2]).read_text())
    for image in content["images"]:
        image["id"] = kind(image["id"])
        image["width"] = float(image["width"])
    for entry in content["annotations"]:
        entry["image_id"] = kind(entry["image_id"])
        entry["category_id"] = float(entry["category_id"])
    for category in content["categories"]:
        category["id"] = float(category["id"])
    (tmp_path / "set.json").write_text(json.dumps(content))
    options = ["--config-file", CONFIG, *overrides, f"train.output_dir={tmp_path}/out"]
    options += [f"dataset.{split}.json={tmp_path}/set.json" for split in ("train", "val")]
    results = main(default_argument_parser().parse_args([*options, "train.max_iter=1"]))
    assert math.isfinite(results["bbox"]["AP"])


@pytest.mark.fault(46)
def test_every_image_keeps_its_boxes_through_the_augmentation(overrides):
    cfg = load_config(CONFIG, [*overrides, "model.num_classes=3"])
    dataset = instantiate(cfg.dataloader.train.dataset)
    mapper = instantiate(cfg.dataloader.train.mapper)
    np.random.seed(0)
    kept = {}
    for item in dataset:
        for _ in range(20):
            result = mapper(item)
            _, height, width = result["image"].shape
            assert 1 <= min(height, width) and max(height, width) <= 66
            boxes = result["instances"].gt_boxes.tensor
            assert bool((boxes >= 0).all()) and bool((boxes[:, 2:] > boxes[:, :2]).all())
            assert bool((boxes <= torch.tensor([width, height] * 2)).all())
            name = Path(item["file_name"]).name
            kept[name] = max(kept.get(name, 0), len(boxes))
    assert kept.pop("none.png") == 0 and kept.pop("crowded.png") == 1000
    assert set(kept.values()) == {1}


@pytest.mark.fault(46)
@pytest.mark.parametrize("size", SHAPES.values())
def test_no_side_is_below_one_pixel(size):
    width, height = size
    image = np.zeros((height, width, 3), np.uint8)
    long_side = min(1333, 800 * max(size))
    for augmentation in (
        ResizeShortestEdge(800, 1333),
        ResizeShortestEdge([480, 800], 1333, "range"),
    ):
        aug_input = T.AugInput(image, boxes=np.array([[0, 0, width, height]], np.float32))
        augmentation(aug_input)
        new_height, new_width = aug_input.image.shape[:2]
        assert min(new_height, new_width) >= 1 and max(new_height, new_width) <= long_side
        assert aug_input.boxes[0] == pytest.approx([0, 0, new_width, new_height])


def test_other_images_are_resized_as_by_detectron2():
    ours, theirs = ResizeShortestEdge(800, 1333), T.ResizeShortestEdge(800, 1333)
    for shape in ((480, 640, 3), (640, 30, 3), (7, 9, 3)):
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        one, other = (a.get_transform(image).apply_image(image) for a in (ours, theirs))
        assert (one == other).all()


@pytest.mark.fault(46)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_take_the_smallest_and_the_longest_images(family):
    config = small_config(family)
    config.neck.embed_dim = 64  # as the published: more channels than groups of GroupNorm
    model = instantiate(config)
    batch = []
    for width, height in ((1, 1), (1, 333), (333, 1)):
        target = Instances((height, width))
        target.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, width, height]]))
        target.gt_classes = torch.tensor([1])
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": target, "height": height, "width": width})
    for part in (batch, *([item] for item in batch)):
        losses = model.train()(part)
        assert all(torch.isfinite(value) for value in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(bool(torch.isfinite(g).all()) for g in gradients)
        with torch.no_grad():
            outputs = model.eval()(part)
        for item, output in zip(part, outputs):
            boxes = output["instances"].pred_boxes.tensor
            assert bool(torch.isfinite(boxes).all())
            assert output["instances"].image_size == (item["height"], item["width"])
