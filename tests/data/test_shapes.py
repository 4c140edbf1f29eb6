"""The built-in shapes data: what is drawn, what is kept on disk. Needs numpy and Pillow only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dn_detr.data import shapes
from dn_detr.data.shapes import generate_shapes, main
from dn_detr.data.shapes_drawing import (
    CLASSES,
    MIN_CONTRAST,
    MIN_VISIBLE,
    ShapesSpec,
    _place,
    draw_image,
)


def spec(height=128, width=128, classes=CLASSES, objects=(1, 6), shape_size=(0.1, 0.6)):
    return ShapesSpec(height, width, 1, 1, classes, objects, shape_size, 0)


def draw(count, **kwargs):
    return [draw_image(np.random.default_rng([7, i]), spec(**kwargs)) for i in range(count)]


def annotations(root, split="train"):
    return json.loads((Path(root) / f"{split}.json").read_text())


def files(root):
    """Content of every file under root, by relative path."""
    return {p.relative_to(root): p.read_bytes() for p in sorted(Path(root).rglob("*.*"))}


def test_layout_and_coco_format(tmp_path):
    root = generate_shapes(str(tmp_path / "s"), size=(48, 80), num_train=5, num_val=3)
    assert root == str(tmp_path / "s")
    for split, count in (("train", 5), ("val", 3)):
        data = annotations(root, split)
        assert [c["name"] for c in data["categories"]] == list(CLASSES)
        assert [c["id"] for c in data["categories"]] == [1, 2, 3, 4, 5]
        assert [i["id"] for i in data["images"]] == list(range(1, count + 1))
        assert len({a["id"] for a in data["annotations"]}) == len(data["annotations"]) > 0
        for entry in data["images"]:
            image = Image.open(Path(root) / split / entry["file_name"])
            assert image.size == (entry["width"], entry["height"]) == (80, 48)
            assert image.mode == "RGB"
        for a in data["annotations"]:
            x, y, w, h = a["bbox"]
            assert 0 <= x and 0 <= y and x + w <= 80 and y + h <= 48 and min(w, h) >= 1
            assert 0 < a["area"] <= w * h
            assert a["iscrowd"] == 0 and 1 <= a["image_id"] <= count


def test_pictures_follow_the_seed_and_not_the_workers(tmp_path):
    args = {"size": 32, "num_train": 70, "num_val": 2}
    one = files(generate_shapes(str(tmp_path / "one"), workers=1, **args))
    two = files(generate_shapes(str(tmp_path / "two"), workers=2, **args))
    other = files(generate_shapes(str(tmp_path / "other"), workers=1, seed=1, **args))
    assert one == two
    assert one.keys() == other.keys()
    assert all(one[p] != other[p] for p in one)


def test_more_images_keep_the_first_and_splits_differ(tmp_path):
    few = files(generate_shapes(str(tmp_path / "few"), size=32, num_train=2, num_val=2))
    more = files(generate_shapes(str(tmp_path / "more"), size=32, num_train=4, num_val=2))
    for name in (Path("train/000002.png"), Path("val/000002.png")):
        assert few[name] == more[name]
    assert few[Path("train/000001.png")] != few[Path("val/000001.png")]


def test_made_again_only_when_the_arguments_differ(tmp_path):
    root = str(tmp_path / "s")
    generate_shapes(root, size=32, num_train=2, num_val=1)
    marker = Path(root) / "train" / "000001.png"
    before = marker.stat().st_mtime_ns
    generate_shapes(root, size=32, num_train=2, num_val=1, workers=2)
    assert marker.stat().st_mtime_ns == before
    generate_shapes(root, size=32, num_train=3, num_val=1)
    assert len(os.listdir(Path(root) / "train")) == 3 == len(annotations(root)["images"])
    marker.unlink()
    generate_shapes(root, size=32, num_train=3, num_val=1)
    assert marker.exists()
    assert not [n for n in os.listdir(tmp_path) if n.endswith((".partial", ".old"))]


def test_an_interrupted_generation_is_not_taken_for_complete(tmp_path, monkeypatch):
    root = tmp_path / "s"
    generate_shapes(str(root), size=32, num_train=2, num_val=1)
    before = files(root)

    def interrupted(*args):
        if args[2] == "val":
            raise KeyboardInterrupt
        return []

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_write_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_shapes(str(root), size=32, num_train=3, num_val=1)
    assert files(root) == before
    generate_shapes(str(root), size=32, num_train=3, num_val=1)
    assert len(os.listdir(root / "train")) == 3


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no shapes data"):
        generate_shapes(str(tmp_path), size=32, num_train=1, num_val=1)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    empty = tmp_path / "empty"
    empty.mkdir()
    generate_shapes(str(empty), size=32, num_train=1, num_val=1)


def test_numbers_sizes_and_classes():
    drawn = draw(200)
    counts = np.bincount([len(objects) for _, objects in drawn], minlength=7)
    assert counts[0] == 0 and (counts[1:7] > 10).all() and len(counts) == 7
    everything = [o for _, objects in drawn for o in objects]
    kinds = np.bincount([o["category_id"] for o in everything], minlength=6)
    assert kinds[0] == 0 and (kinds[1:] > 70).all()
    sides = np.array([max(o["bbox"][2:]) for o in everything])
    assert 6 <= sides.min() < 15 and 70 < sides.max() <= 128
    only = draw(20, classes=("star", "ring"))
    assert {o["category_id"] for _, objects in only for o in objects} == {1, 2}


def test_boxes_enclose_what_is_seen(monkeypatch):
    """On a flat background the shape is what differs from it (averaged over 4 x 4 pixels)."""
    monkeypatch.setattr(
        "dn_detr.data.shapes_drawing._background",
        lambda rng, h, w: np.full((h, w, 3), 128, np.float32),
    )
    for i in range(30):
        image, objects = draw_image(np.random.default_rng(i), spec(objects=(1, 1)))
        (bbox,) = [o["bbox"] for o in objects]
        smooth = np.asarray(Image.fromarray(image).reduce(4), dtype=float)
        differs = np.abs(smooth - 128).max(2) > 30
        ys, xs = np.nonzero(differs)
        seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * 4
        x, y, w, h = bbox
        assert np.abs(seen - [x, y, x + w, y + h]).max() <= 6


def test_every_shape_stays_visible_and_stands_out():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        image = np.full((64, 96, 3), rng.uniform(0, 255), np.float32)
        owner = np.full((64, 96), -1, np.int32)
        shapes = []
        for _ in range(40):
            before = image.copy()
            painted = _place(rng, (0.1, 0.8), CLASSES[rng.integers(5)], image, owner, shapes)
            assert painted == (not np.array_equal(image, before))
            if painted:
                mask = owner == len(shapes) - 1
                contrast = np.abs(image[mask].mean(0) - before[mask].mean(0)).max()
                assert contrast > MIN_CONTRAST - 10  # the edge is smooth, the shading uneven
        assert 4 < len(shapes) < 40
        for index, shape in enumerate(shapes):
            assert shape.visible == (owner == index).sum() >= MIN_VISIBLE * shape.whole


def test_dense_scenes_are_dense_and_small(tmp_path):
    root = generate_shapes(
        str(tmp_path / "s"), size=(192, 256), num_train=3, num_val=1, objects=(110, 140)
    )
    data = annotations(root)
    counts = np.bincount([a["image_id"] for a in data["annotations"]])[1:]
    assert (counts >= 100).all()
    assert max(max(a["bbox"][2:]) for a in data["annotations"]) < 0.2 * 192


def test_images_without_objects_can_be_asked_for(tmp_path):
    root = generate_shapes(str(tmp_path / "s"), size=32, num_train=20, num_val=1, objects=(0, 1))
    assert 0 < len(annotations(root)["annotations"]) < 20


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"classes": ["circle", "hexagon"]}, "out of circle, square, triangle, star, ring"),
        ({"classes": []}, "give each class once"),
        ({"size": 8}, "at least 16 pixels"),
        ({"num_val": 0}, "each split needs an image"),
        ({"objects": (4, 2)}, "0 <= least <= most"),
        ({"shape_size": (0.5, 1.5)}, "least <= most <= 1"),
        ({"seed": -1}, "must be 0 or more"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, text):
    with pytest.raises(ValueError, match=text):
        generate_shapes(str(tmp_path / "s"), **arguments)
    assert not (tmp_path / "s").exists()


def test_command_line(tmp_path, capsys):
    root = str(tmp_path / "s")
    main([root, "--size", "32", "48", "--num-train", "2", "--num-val", "1", "--objects", "2", "3"])
    assert capsys.readouterr().out.strip() == root
    assert annotations(root)["images"][0]["width"] == 48
    with pytest.raises(SystemExit):
        main([root, "--size", "4"])
    assert "at least 16 pixels" in capsys.readouterr().err


def test_needs_neither_torch_nor_detectron2():
    code = (
        "import sys, dn_detr.data.shapes, dn_detr.data.check\n"
        "print([m for m in ('torch', 'detectron2', 'pycocotools') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
