"""The data configs: they survive saving, take a user's own set, and give what a model takes."""

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch  # noqa: E402
from detectron2.config import LazyConfig, instantiate  # noqa: E402
from detectron2.data import transforms as T  # noqa: E402

from .coco_files import annotation, write_set  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs" / "common" / "data"

NO_WORKERS = ("dataloader.train.num_workers=0", "dataloader.test.num_workers=0")


def load(name, tmp_path, *overrides):
    """A config beside a model's and the training's words, saved and loaded again."""
    cfg = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    cfg.model = {"num_classes": None}
    cfg.train = {"output_dir": str(tmp_path / "output"), "seed": 0}
    LazyConfig.apply_overrides(cfg, [*NO_WORKERS, *overrides])
    LazyConfig.save(cfg, str(tmp_path / "saved.yaml"))
    assert not (tmp_path / "saved.yaml.pkl").exists()
    return LazyConfig.load(str(tmp_path / "saved.yaml"))


def own_data(tmp_path):
    """Overrides for a small set with a crowd, an empty image, and gaps between the ids."""
    annotations = [annotation(1, 1, 7), annotation(2, 2, 4, iscrowd=1), annotation(3, 3, 4)]
    json_file, images = write_set(
        tmp_path, annotations, ((40, 30), (30, 50), (64, 48), (50, 50)), ((4, "a"), (7, "b"))
    )
    return [
        f"dataset.{split}.{key}={value}"
        for split in ("train", "val")
        for key, value in (("json", json_file), ("images", images))
    ]


@pytest.mark.parametrize("name", ["coco", "shapes"])
def test_own_data_by_overrides(tmp_path, name):
    cfg = load(name, tmp_path, *own_data(tmp_path), "dataloader.train.total_batch_size=4")
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert len(batch) == 4
    classes = {d["image_id"]: d["instances"].gt_classes.tolist() for d in batch}
    expected = {1: [1], 2: [], 3: [0], 4: []}
    if name == "shapes":  # no crop
        assert classes == expected
    for d in batch:
        assert d["image"].dtype == torch.uint8 and d["image"].shape[0] == 3
        assert d["instances"].image_size == tuple(d["image"].shape[1:])
    assert len(instantiate(cfg.dataloader.test)) == 4
    evaluator = instantiate(cfg.dataloader.evaluator)
    assert evaluator._output_dir == str(tmp_path / "output" / "inference")


def test_number_of_classes_stands_once(tmp_path):
    cfg = load("shapes", tmp_path, *own_data(tmp_path), "model.num_classes=8")
    dicts = instantiate(cfg.dataloader.train.dataset)
    assert [a["category_id"] for d in dicts for a in d["annotations"]] == [7, 4, 4]


def test_coco_is_found_under_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    cfg = load("coco", tmp_path)
    assert cfg.dataset.train.json == "/data/coco/annotations/instances_train2017.json"
    assert cfg.dataset.val.images == "/data/coco/val2017"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert cfg.dataset.val.images == "./datasets/coco/val2017"
    assert cfg.dataloader.train.total_batch_size == 16


def test_detrs_augmentation(tmp_path):
    cfg = load("coco", tmp_path)
    augmentation = instantiate(cfg.dataloader.train.mapper).augmentations
    np.random.seed(0)
    shapes, cropped = set(), 0
    for _ in range(60):
        aug_input = T.AugInput(np.zeros((48, 64, 3), np.uint8))
        transforms = augmentation(aug_input)
        shapes.add(min(aug_input.image.shape[:2]))
        cropped += any(isinstance(t, T.CropTransform) for t in transforms.transforms)
    assert shapes <= set(range(480, 801, 32)) and len(shapes) > 6
    assert 15 < cropped < 45


def resized(augmentation, height, width):
    aug_input = T.AugInput(np.zeros((height, width, 3), np.uint8))
    augmentation(aug_input)
    return aug_input.image.shape[:2]


def test_longer_side_is_limited(tmp_path):
    cfg = load("coco", tmp_path)
    train, test = (
        instantiate(cfg.dataloader[part].mapper).augmentations for part in ("train", "test")
    )
    assert max(resized(train, 600, 20)) <= 1333
    assert resized(test, 600, 20) == (1333, 44)
    assert resized(test, 30, 40) == (800, 1067)


def test_shapes_are_made_and_loaded(tmp_path):
    cfg = load(
        "shapes",
        tmp_path,
        f"dataset.root={tmp_path / 'shapes'}",
        "dataset.generate.num_train=9",
        "dataset.generate.num_val=2",
        "dataset.generate.size=[32,48]",
    )
    assert instantiate(cfg.dataset.generate) == str(tmp_path / "shapes")
    assert os.path.dirname(cfg.dataset.train.json) == str(tmp_path / "shapes")
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert len(batch) == 8
    assert {tuple(d["image"].shape) for d in batch} == {(3, 32, 48), (3, 48, 32)}
    first = next(iter(instantiate(cfg.dataloader.test)))[0]
    assert first["image"].shape == (3, 32, 48)
