"""What is wrong with a data set stops a training and the tool alike, and harms nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.engine import default_argument_parser  # noqa: E402

from dn_detr.data.inspection import CocoSet, inspect_sets  # noqa: E402
from dn_detr.engine.launch import guarded_main  # noqa: E402
from dn_detr.engine.main import main  # noqa: E402

from .coco_files import annotation, write_set  # noqa: E402

CONFIG = str(Path(__file__).parents[1] / "engine" / "tiny_config.py")
GOOD = [annotation(1), annotation(2, 2, 2), annotation(3, 3), annotation(4, 4, 2)]
SIZES = ((40, 30), (30, 50), (40, 30), (40, 30))


def arguments(folder, *overrides, flags=()):
    return default_argument_parser().parse_args(
        [
            *("--config-file", CONFIG, *flags, f"train.output_dir={folder / 'output'}"),
            *(f"dataset.{s}.json={folder / s / 'set.json'}" for s in ("train", "val")),
            *(f"dataset.{s}.images={folder / s / 'images'}" for s in ("train", "val")),
            *("train.max_iter=2", "train.eval_period=0", "train.checkpointer.period=100"),
            *("dataloader.train.mapper.augmentations=[]", *overrides),
        ]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two good sets and a training of one iteration."""
    folder = tmp_path_factory.mktemp("trained")
    for split in ("train", "val"):
        write_set(folder / split, GOOD, SIZES)
    main(arguments(folder, "train.max_iter=1"))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def kept_files(folder):
    """Contents of what a run may not change."""
    checkpoints = [*(folder / "output").glob("*.pth"), folder / "output" / "last_checkpoint"]
    return {path: path.read_bytes() for path in (*checkpoints, *folder.glob("*/set.json"))}


def refused(folder, *overrides, flags=("--resume",)):
    """The message that a training ends with: one, with status 1, and nothing lost."""
    before = kept_files(folder)
    assert any(path.suffix == ".pth" for path in before)
    with pytest.raises(SystemExit) as info:
        guarded_main(arguments(folder, *overrides, flags=flags))
    message = info.value.code
    assert isinstance(message, str) and message.startswith("error: ")  # so the status is 1
    assert kept_files(folder) == before
    return message


def told(folder, split, capsys, open_all=False):
    """What the tool prints; asserts that it finds the set unfit."""
    capsys.readouterr()
    paths = str(folder / split / "set.json"), str(folder / split / "images")
    assert not inspect_sets([CocoSet(*paths)], open_all)
    return capsys.readouterr().out


@pytest.mark.fault(35)
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"images": [{"id": 1', "at byte 20 of 20"),
        ("", "it is empty (0 bytes)"),
        ("[]", "holds a list, not an object"),
        ("id,file\n1,a.jpg", "at byte 0 of 15"),
    ],
)
def test_files_that_are_no_annotations(folder, split, text, part, capsys):
    (folder / split / "set.json").write_text(text)
    for message in (refused(folder), told(folder, split, capsys)):
        assert str(folder / split / "set.json") in message and part in message


def change(folder, split, **sections):
    path = folder / split / "set.json"
    content = {**json.loads(path.read_text()), **sections}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


ROWS = [
    (36, {"annotations": None}, ["section 'annotations' is missing"]),
    (36, {"annotations": []}, ["section 'annotations' is empty"]),
    (37, {"annotations": [*GOOD, annotation(9, bbox=None)]}, ["id 9 (image 1, 1.png) has none"]),
    (37, {"annotations": [*GOOD, annotation(9, category_id=None)]}, ["'category_id'", "id 9"]),
    (37, {"annotations": [*GOOD, annotation(9, image_id=None)]}, ["'image_id'", "id 9 has none"]),
    (38, {"annotations": [*GOOD, annotation(9, bbox=[1, 2, 3])]}, ["id 9", "[1, 2, 3]"]),
    (38, {"annotations": [*GOOD, annotation(9, bbox=[1, 2, float("nan"), 4])]}, ["id 9", "nan"]),
    (40, {"annotations": [*GOOD, annotation(9, category_id=5)]}, ["(1, 2) (1): id 9", "has 5"]),
    (41, {"annotations": [*GOOD, annotation(9, image_id=77)]}, ["'image_id'", "id 9 (image 77)"]),
    (41, {"annotations": [*GOOD, annotation(1)]}, ["annotation ids given more than once (1): 1"]),
    (48, {"annotations": [annotation(1, bbox=[5, 5, 0, 5])]}, ["no box that can be used"]),
]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("sections", "parts"),
    [pytest.param(s, p, marks=pytest.mark.fault(row)) for row, s, p in ROWS],
)
def test_faults_of_the_annotations(folder, split, sections, parts, capsys):
    change(folder, split, **sections)
    message = refused(folder)
    assert str(folder / split / "set.json") in message
    assert "Correct or remove these entries; tools/check_dataset.py" in message
    said = told(folder, split, capsys)
    for part in parts:
        assert part in message
        assert part.replace(" (1): ", " (1)\n            ") in said


@pytest.mark.fault(36)
@pytest.mark.parametrize("section", ["images", "categories"])
@pytest.mark.parametrize("value", [None, []])
def test_sections_that_are_missing_or_empty(folder, section, value, capsys):
    for split in ("train", "val"):
        change(folder, split, **{section: value})
    assert section in refused(folder)
    assert f"the section '{section}' is" in told(folder, "train", capsys)


@pytest.mark.fault(39)
def test_strict_is_a_word_of_the_config(folder, capsys):
    change(folder, "train", annotations=[*GOOD, annotation(9, bbox=[-4, 0, 9, 9])])
    options = "+dataloader.train.dataset.strict=True"
    assert "id 9 (image 1, 1.png) has [-4, 0, 9, 9]" in refused(folder, options)
    main(arguments(folder, flags=["--resume"]))
    log = (folder / "output" / "log.txt").read_text()
    assert log.count("over the edge of their image, clipped (1): id 9") == 1


@pytest.mark.fault(41)
@pytest.mark.fault(43)
@pytest.mark.fault(47)
@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"id": 1, "file_name": "2.png"}, "image ids given more than once (1): 1"),
        ({"id": 9, "file_name": "none.png"}, "/images (1): id 9 (none.png)"),
        ({"id": 9, "file_name": "../set.json"}, "/images (1): id 9 (../set.json)"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_faults_of_the_images(folder, split, entry, part, capsys):
    images = json.loads((folder / split / "set.json").read_text())["images"]
    change(folder, split, images=[*images, {"width": 40, "height": 30, **entry}])
    message = refused(folder)
    assert part in message and str(folder / split / "set.json") in message
    assert part.replace(" (1): ", " (1)\n            ") in told(folder, split, capsys)


@pytest.mark.fault(43)
def test_an_image_that_vanishes_is_named(folder, monkeypatch):
    monkeypatch.setattr("dn_detr.data.check._examine_files", lambda *_: [])  # it was there before
    (folder / "train" / "images" / "2.png").unlink()
    message = refused(folder)
    assert f"The image {folder}/train/images/2.png (id 2) cannot be read: " in message
    assert "No such file" in message and "Replace the file, or remove its entry" in message


@pytest.mark.fault(44)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_images_that_cannot_be_read(folder, split, workers, capsys):
    image = folder / split / "images" / "2.png"
    image.write_bytes(image.read_bytes()[:-100])
    options = [f"dataloader.{s}.num_workers={workers}" for s in ("train", "test")]
    if split == "val":
        options.append(f"train.init_checkpoint={folder}/output/model_final.pth")
    flags = ["--resume"] if split == "train" else ["--eval-only"]
    message = refused(folder, *options, flags=flags)
    assert f"The image {image} (id 2) cannot be read: image file is truncated" in message
    assert "Replace the file, or remove its entry" in message
    assert ("dataloader.train.on_bad_image=skip" in message) == (split == "train")
    assert "2.png (id 2): image file is truncated" in told(folder, split, capsys, open_all=True)


@pytest.mark.fault(44)
@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "the file is empty (0 bytes)"), (b"404: none", "it begins with b'404: none'")],
)
def test_files_that_are_no_images(folder, content, part, capsys):
    (folder / "train" / "images" / "2.png").write_bytes(content)
    message = refused(folder)
    assert "2.png (id 2) cannot be read: " in message and part in message
    assert part in told(folder, "train", capsys, open_all=True)


@pytest.mark.fault(44)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(folder, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # an error above twice of it
    message = refused(folder)
    assert "2.png (id 2) cannot be read: Image size (1500 pixels) exceeds limit" in message
    assert "MAX_IMAGE_PIXELS" in message
    said = told(folder, "train", capsys, open_all=True)
    assert "2.png (id 2): Image size (1500" in said and "WARNING very large images" in said


@pytest.mark.fault(45)
def test_sizes_that_differ(folder, capsys):
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.zeros((50, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "train" / "images" / "2.png", exif=exif)
    message = refused(folder)
    difference = "is 50x30 (width x height, after its EXIF orientation 6), but the annotation file"
    assert f"2.png (id 2) {difference} says 30x50" in message
    assert "Correct the entry and its boxes, or the image" in message
    assert f"2.png (id 2) {difference} says 30x50" in told(folder, "train", capsys, open_all=True)
