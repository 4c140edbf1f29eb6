"""The check of annotation files: every fault named, bad boxes mended. Needs no detectron2."""

import json
import logging
import time
from pathlib import Path

import pytest

from dn_detr.data.categories import DatasetError
from dn_detr.data.check import check_coco, complete_annotations

from .coco_files import annotation, write_set


def error_of(json_file, images):
    with pytest.raises(DatasetError) as error:
        check_coco(json_file, images)
    return str(error.value)


def test_a_good_set_passes_in_silence(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    paths = write_set(tmp_path, [annotation(1), annotation(2, 2, 2, iscrowd=1)])
    report = check_coco(*paths)
    assert [i["id"] for i in report.images] == [1, 2]
    assert report.annotations[0] == annotation(1, bbox=[2.0, 3.0, 10.0, 8.0])
    assert report.annotations[1]["iscrowd"] == 1
    assert (report.clipped, report.dropped, report.filled) == (0, 0, 0)
    assert report.categories == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert not caplog.records


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([-5, -6, 20, 20], [0, 0, 15, 14]),
        ([30, 20, 100, 1e9], [30, 20, 10, 10]),
        ([-1e9, -1e9, 2e9, 2e9], [0, 0, 40, 30]),
        ([0, 0, 40.004, 30], [0, 0, 40, 30]),
        ([5.5, 6.25, 0.5, 0.5], [5.5, 6.25, 0.5, 0.5]),
        ([5, 5, 0, 10], None),
        ([5, 5, 10, 0], None),
        ([5, 5, -3, 10], None),
        ([-5, 5, -10, 10], None),
        ([40, 5, 10, 10], None),
        ([5, -20, 10, 20], None),
        ([1e308, 5, 1e308, 10], None),
    ],
)
def test_boxes_are_clipped_or_dropped(tmp_path, bbox, expected):
    report = check_coco(*write_set(tmp_path, [annotation(1, bbox=bbox), annotation(2)]))
    kept = {a["id"]: a["bbox"] for a in report.annotations}
    assert kept.get(1) == expected
    assert report.dropped == (expected is None)
    moved = expected is not None and max(abs(a - b) for a, b in zip(bbox, expected)) > 0.01
    assert report.clipped == moved


def test_repairs_are_counted_in_one_line(tmp_path, caplog):
    faulty = [
        annotation(1, bbox=[-5, -6, 20, 20]),
        annotation(2, bbox=[30, 20, 100, 100]),
        annotation(3, bbox=[5, 5, 0, 10]),
        annotation(4, iscrowd=None),
        annotation(5, area=None),
        annotation(6, area=None, iscrowd=None),
    ]
    report = check_coco(*write_set(tmp_path, faulty))
    assert (report.clipped, report.dropped, report.filled) == (2, 1, 3)
    (record,) = caplog.records
    for text in ("set.json", "2 boxes clipped", "1 dropped", "3 annotations"):
        assert text in record.getMessage()
    by_id = {a["id"]: a for a in report.annotations}
    assert by_id[6]["area"] == 80 and by_id[6]["iscrowd"] == 0 and by_id[4]["area"] == 70


@pytest.mark.parametrize(
    ("faulty", "text"),
    [
        (annotation(7, image_id=99), "'image_id' is not among the images: id 7"),
        (annotation(7, image_id=None), "'image_id' is not among the images: id 7"),
        (annotation(7, category_id=3), "not among the categories (1, 2): id 7 (3)"),
        (annotation(7, category_id=[1]), "not among the categories (1, 2): id 7 ([1])"),
        (annotation(1), "annotation ids given more than once: 1"),
        (annotation(None), "annotations without an 'id'"),
        (annotation(7, bbox=None), "'bbox' is not a list of four finite numbers: id 7"),
        (annotation(7, bbox=[1, 2, 3]), "four finite numbers: id 7"),
        (annotation(7, bbox=[]), "four finite numbers: id 7"),
        (annotation(7, bbox=[1, 2, "3", 4]), "four finite numbers: id 7"),
        (annotation(7, bbox="1 2 3 4"), "four finite numbers: id 7"),
        (annotation(7, bbox=[1, 2, True, 4]), "four finite numbers: id 7"),
        (annotation(7, bbox=[1, 2, float("nan"), 4]), "four finite numbers: id 7"),
        (annotation(7, bbox=[1, 2, float("inf"), 4]), "four finite numbers: id 7"),
    ],
)
def test_faulty_annotations_stop(tmp_path, faulty, text):
    paths = write_set(tmp_path, [annotation(1), faulty])
    message = error_of(*paths)
    assert text in message and paths[0] in message


def test_all_problems_are_told_at_once_with_ten_ids_and_the_total(tmp_path):
    many = [annotation(i, category_id=8) for i in range(100, 125)]
    json_file, images = write_set(tmp_path, [*many, annotation(1, image_id=5)])
    (Path(images) / "2.png").unlink()
    message = error_of(json_file, images)
    assert "id 109 (8), ... (25 in all)" in message and "id 110" not in message
    assert "not among the images: id 1" in message
    assert f"images that are not in {images}: 2.png (id 2)" in message


def test_missing_folder_of_images(tmp_path):
    json_file, _ = write_set(tmp_path, [annotation(1)])
    message = error_of(json_file, str(tmp_path / "elsewhere"))
    assert f"there is no folder {tmp_path / 'elsewhere'}" in message
    assert "1.png" not in message


def test_images_in_sub_folders(tmp_path):
    json_file, images = write_set(tmp_path, [annotation(1)])
    content = json.loads(Path(json_file).read_text())
    content["images"][0]["file_name"] = "part/one/1.png"
    Path(json_file).write_text(json.dumps(content))
    assert "part/one/1.png (id 1)" in error_of(json_file, images)
    (Path(images) / "part" / "one").mkdir(parents=True)
    (Path(images) / "1.png").rename(Path(images) / "part" / "one" / "1.png")
    check_coco(json_file, images)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"file_name": "1.png", "width": 4, "height": 4}, "images without an 'id'"),
        ({"id": 1, "file_name": "1.png", "width": 4, "height": 4}, "more than once: 1"),
        ({"id": "x", "file_name": "1.png", "width": 4, "height": 4}, "and others strings"),
        ({"id": 3, "width": 4, "height": 4}, "images without a 'file_name': id 3"),
        ({"id": 3, "file_name": "1.png", "height": 4}, "positive integer 'width': id 3"),
        ({"id": 3, "file_name": "1.png", "width": 4, "height": 0}, "integer 'height': id 3"),
    ],
)
def test_faulty_images_stop(tmp_path, entry, text):
    good = {"id": 1, "file_name": "1.png", "width": 40, "height": 30}
    paths = write_set(tmp_path, [annotation(1)], images=[good, entry])
    assert text in error_of(*paths)


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"annotations": None}, "no section 'annotations'"),
        ({"annotations": {"1": 2}}, "no section 'annotations'"),
        ({"images": None}, "no section 'images'"),
        ({"images": []}, "'images' is empty"),
        ({"annotations": []}, "it holds no box"),
        ({"annotations": [annotation(1, bbox=[5, 5, 0, 0])]}, "it holds no box"),
        ({"categories": None}, "no list 'categories'"),
    ],
)
def test_missing_sections(tmp_path, sections, text):
    json_file, images = write_set(tmp_path, [annotation(1)])
    content = {**json.loads(Path(json_file).read_text()), **sections}
    content = {name: section for name, section in content.items() if section is not None}
    Path(json_file).write_text(json.dumps(content))
    assert text in error_of(json_file, images)


def test_repeated_category_names_are_mentioned(tmp_path, caplog):
    check_coco(*write_set(tmp_path, [annotation(1)], categories=((1, "cat"), (2, "cat"))))
    assert "several categories are called cat" in caplog.text


def test_annotations_are_completed_for_pycocotools():
    entries = [{"bbox": [1, 2, 3, 4]}, {"bbox": [1, 2, 3, 4], "area": 5, "iscrowd": 1}]
    assert complete_annotations(entries) == 1
    assert entries[0] == {"bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
    assert entries[1]["area"] == 5


def test_large_files_are_quick(tmp_path):
    """COCO's train2017 is nine times this: 118,000 images, 860,000 boxes."""
    json_file, images = write_set(tmp_path, [])
    content = json.loads(Path(json_file).read_text())
    content["annotations"] = [annotation(i, image_id=1 + i % 2) for i in range(100_000)]
    Path(json_file).write_text(json.dumps(content))
    start = time.process_time()
    report = check_coco(json_file, images)
    assert len(report.annotations) == 100_000
    assert time.process_time() - start < 10
