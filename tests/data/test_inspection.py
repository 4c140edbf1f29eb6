"""tools/check_dataset.py: what it prints, writes and draws. Only configs need detectron2."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dn_detr.data.check import examine_coco
from dn_detr.data.inspection import CocoSet, inspect_sets
from dn_detr.data.plots import plot_summary
from dn_detr.data.summary import class_rows, summarize, totals

from .coco_files import annotation, write_set

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tools" / "check_dataset.py")


def tool(capsys, *options):
    """Status and output of the script, run in this process."""
    before, sys.argv = sys.argv, [SCRIPT, *map(str, options)]
    try:
        with pytest.raises(SystemExit) as info:
            runpy.run_path(SCRIPT, run_name="__main__")
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    status = info.value.code
    if isinstance(status, str):
        return 1, captured.out + status
    return status or 0, captured.out + captured.err


def good_set(folder):
    return write_set(
        folder,
        [
            annotation(1),
            annotation(2, 1, 2, area=2000.0),
            annotation(3, 1, 1, iscrowd=1, area=1e4),
            annotation(4, 1),
        ],
        categories=((1, "cat"), (2, "dog"), (3, "fish")),
    )


def faulty_set(folder):
    return write_set(
        folder, [annotation(i, bbox=[1]) for i in range(12)] + [annotation(20, bbox=[-1, 2, 5, 5])]
    )


def test_a_good_set_ends_with_status_0_and_a_table(tmp_path, capsys):
    status, out = tool(capsys, *good_set(tmp_path))
    assert status == 0 and "ERROR" not in out and "WARNING" not in out
    for row in (
        "NOTE    classes without a box (1)\n            id 3 'fish'\n",
        "classes        3, of which 1 have no box",
        "images         2, of which 1 have no box",
        "boxes          4, of which 1 are crowds",
        "image width    min 30, median 35, max 40",
        "boxes an image min 0, median 2, max 4, mean 2.0",
        "small 50%, medium 25%, large 25%",
    ):
        assert row in out
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "cat", "3", "75.0", "1"] in rows and ["3", "fish", "0", "0.0", "0"] in rows


def test_faults_are_printed_and_status_is_1(tmp_path, capsys):
    status, out = tool(capsys, *faulty_set(tmp_path))
    assert status == 1
    assert "ERROR   annotations whose 'bbox' is not a list of four finite numbers (12)" in out
    assert "id 9 (image 1, 1.png) has [1]\n            ... 2 more (--all prints them" in out
    assert "WARNING boxes that reach over the edge of their image, clipped (1)" in out
    status, out = tool(capsys, *faulty_set(tmp_path), "--all")
    assert "id 11 (image 1, 1.png) has [1]" in out and "more (" not in out


@pytest.mark.fault(39)
def test_repairs_are_errors_if_strict(tmp_path, capsys):
    paths = write_set(tmp_path, [annotation(1), annotation(2, bbox=[-1, 2, 5, 5])])
    assert tool(capsys, *paths)[0] == 0
    status, out = tool(capsys, *paths, "--strict")
    assert status == 1 and "ERROR   boxes that reach over the edge" in out


@pytest.mark.fault(35)
def test_one_broken_file_does_not_hide_the_other(tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text('{"images": [')
    status, out = tool(capsys, broken, tmp_path, *faulty_set(tmp_path))
    assert status == 1
    assert f"ERROR {broken} is not valid JSON" in out and "at byte 12 of 12" in out
    assert "four finite numbers (12)" in out


def test_sets_need_the_same_categories(tmp_path, capsys):
    train = write_set(tmp_path / "a", [annotation(1)])
    val = write_set(tmp_path / "b", [annotation(1)], categories=((1, "cat"), (3, "bird")))
    status, out = tool(capsys, *train, *val)
    assert status == 1
    assert f"ERROR   the categories are not those of {train[0]}" in out
    assert "Only here: 3 'bird'; only there (1)\n            2 'dog'" in out
    assert tool(capsys, *train, *train)[0] == 0


@pytest.mark.fault(44)
@pytest.mark.fault(45)
def test_images_are_opened_on_request(tmp_path, capsys):
    json_file, images = good_set(tmp_path)
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(Path(images) / "2.png")
    (Path(images) / "1.png").write_text("text")
    assert tool(capsys, json_file, images)[0] == 0
    status, out = tool(capsys, json_file, images, "--open-images", "--workers", 0)
    assert status == 1
    assert "ERROR   images that cannot be read (1)\n            1.png (id 1): it is not an" in out
    assert "2.png (id 2) is 5x4 (width x height, no EXIF rotation), but the annotation" in out


def test_everything_is_written(tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    status, out = tool(capsys, *faulty_set(tmp_path), *good_set(tmp_path / "b"), "--output", output)
    assert status == 1 and f"{output}/set_1.png" in out
    findings = json.loads((output / "set_1_findings.json").read_text())["findings"]
    assert len(findings[0]["culprits"]) == 12 and findings[0]["level"] == "error"
    assert "fish" in (output / "set_2_summary.txt").read_text()
    for i in (1, 2):
        with Image.open(output / f"set_{i}.png") as picture:
            assert picture.size == (1500, 700)


def test_both_sets_of_a_config(tmp_path, capsys):
    pytest.importorskip("detectron2")
    train, val = good_set(tmp_path / "a"), faulty_set(tmp_path / "b")
    config = ROOT / "tests" / "engine" / "tiny_config.py"
    options = ["--config-file", config, f"dataset.train.json={train[0]}"]
    options += [f"dataset.train.images={train[1]}", f"dataset.val.json={val[0]}"]
    status, out = tool(capsys, *options, f"dataset.val.images={val[1]}", "model.num_classes=7")
    assert status == 1 and "model.num_classes=7" in out
    assert train[0] in out and val[0] in out and "the categories are not those of" in out
    status, out = tool(capsys, *options, "dataset.train.jsn=1")
    assert status == 1 and "error: " in out and "dataset.train.json" in out


@pytest.mark.parametrize("options", [[], ["only.json"], ["a.json", "b", "--workers", "-1"]])
def test_wrong_usage(capsys, options):
    status, out = tool(capsys, *options)
    assert status == 2 and "usage:" in out


def test_it_starts_as_a_script_and_without_torch(tmp_path):
    program = f"""
import runpy, sys
sys.argv = ["x", *{[*good_set(tmp_path), "--output", str(tmp_path / "out")]!r}]
try:
    runpy.run_path({SCRIPT!r}, run_name="__main__")
finally:
    print("torch" in sys.modules, "detectron2" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False False\n")


def many_classes(folder, number):
    categories = [(i + 1, f"$class {i}$") for i in range(number)]
    entries = [annotation(i, category_id=1 + i * i % number) for i in range(2 * number)]
    return examine_coco(*write_set(folder, entries, categories=categories))


@pytest.mark.parametrize("number", [1, 80, 1203])
def test_any_number_of_classes(tmp_path, number):
    summary = summarize(many_classes(tmp_path, number))
    assert summary.boxes.sum() == 2 * number == summary.per_image.sum()
    rows = class_rows(summary).splitlines()
    assert len(rows) == 1 + (101 + 1 if number > 100 else number) - (number > 100)
    assert ("1,103 classes between these" in "\n".join(rows)) == (number > 100)
    assert len(class_rows(summary, number).splitlines()) == 1 + number
    plot_summary(summary, "title", str(tmp_path / "plot.png"))
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (1500, 1200 if number == 80 else 700)
        assert len(picture.getcolors(1 << 24)) > 50


def test_a_set_without_a_usable_box_is_summed_up_too(tmp_path, capsys):
    paths = write_set(tmp_path, [annotation(1, bbox=[1, 1, 0, 0])])
    assert not inspect_sets([CocoSet(*paths)], output=str(tmp_path / "out"))
    out = capsys.readouterr().out
    assert "ERROR   it holds no box that can be used" in out
    assert "boxes          0" in out and (tmp_path / "out" / "set.png").is_file()
    paths = write_set(tmp_path, [], images=[], categories=())
    assert not inspect_sets([CocoSet(*paths)], output=str(tmp_path / "none"))
    assert "images         0" in totals(summarize(examine_coco(*paths)))
