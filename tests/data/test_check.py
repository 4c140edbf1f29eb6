"""The check of annotation files: every fault named, bad boxes mended. Needs no detectron2."""

import json
import logging
import time
from pathlib import Path

import pytest

from dn_detr.data.categories import DatasetError
from dn_detr.data.check import check_coco, complete_annotations, examine_coco

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


@pytest.mark.fault(39)
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


MENDABLE = [
    annotation(1, bbox=[-5, -6, 20, 20]),
    annotation(2, bbox=[30, 20, 100, 1e9]),
    annotation(3, bbox=[5, 5, 0, 10]),
    annotation(4, iscrowd=None),
    annotation(5, area=None),
    annotation(6, area=None, iscrowd=None),
    annotation(7, bbox=[100, 5, 3, 10]),
]


@pytest.mark.fault(37)
@pytest.mark.fault(39)
def test_repairs_are_counted_and_named_in_one_warning_once(tmp_path, caplog):
    paths = write_set(tmp_path, MENDABLE)
    report = check_coco(*paths)
    check_coco(*paths)  # as for every evaluation
    assert (report.clipped, report.dropped, report.filled) == (2, 2, 3)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for text in (
        f"{paths[0]} is used with repairs",
        "over the edge of their image, clipped (2): id 1 (image 1, 1.png) has [-5, -6, 20, 20], id",
        "nothing lies inside their image, dropped (2): id 3 (image 1, 1.png) has [5, 5, 0, 10], id",
        "without 'iscrowd' or 'area', filled in (0, that of the box) (3): id 4 (image 1, 1.png)",
    ):
        assert text in record.getMessage()
    by_id = {a["id"]: a for a in report.annotations}
    assert by_id[6]["area"] == 80 and by_id[6]["iscrowd"] == 0 and by_id[4]["area"] == 70


@pytest.mark.fault(39)
def test_strict_mends_nothing(tmp_path):
    paths = write_set(tmp_path, MENDABLE)
    with pytest.raises(DatasetError) as error:
        check_coco(*paths, strict=True)
    for text in (
        "not clipped, since strict (2): id 1",
        "not dropped, since strict (2): id 3",
        "not filled in (0, that of the box), since strict (3): id 4",
    ):
        assert text in str(error.value)
    check_coco(*write_set(tmp_path, [annotation(1)]), strict=True)


@pytest.mark.parametrize(
    ("faulty", "text"),
    [
        (annotation(7, image_id=99), "among the images (1): id 7 (image 99) has 99"),
        (annotation(7, image_id="1"), "among the images (1): id 7 (image 1) has '1'"),
        (annotation(7, image_id=None), "among the images (1): id 7 has none"),
        (annotation(7, category_id=3), "categories (1, 2) (1): id 7 (image 1, 1.png) has 3"),
        (annotation(7, category_id=[1]), "categories (1, 2) (1): id 7 (image 1, 1.png) has [1]"),
        (annotation(7, category_id=None), "categories (1, 2) (1): id 7 (image 1, 1.png) has none"),
        (annotation(1), "annotation ids given more than once (1): 1"),
        (annotation(None), "without an 'id' (a number or a string) (1): number 1 of the section"),
        (annotation(7, iscrowd="no"), "'iscrowd' is not 0 or 1 (1): id 7 (image 1, 1.png)"),
        (annotation(7, area="big"), "'area' is not a finite number of 0 or more (1): id 7"),
        (annotation(7, area=float("nan")), "'area' is not a finite number of 0 or more (1): id 7"),
    ],
)
@pytest.mark.fault(37)
@pytest.mark.fault(40)
@pytest.mark.fault(41)
def test_faulty_annotations_stop(tmp_path, faulty, text):
    paths = write_set(tmp_path, [annotation(1), faulty])
    message = error_of(*paths)
    assert text in message and paths[0] in message
    assert message.count("\n- ") == 1


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    "bbox",
    [
        *(
            None,
            [],
            [1, 2, 3],
            [1, 2, 3, 4, 5],
            "1 2 3 4",
            {"x": 1},
            [1, 2, "3", 4],
            [1, 2, None, 4],
        ),
        *([1, 2, True, 4], [[1], 2, 3, 4], [1, 2, 10**400, 4]),
        *([1, 2, float("nan"), 4], [1, 2, float("inf"), 4], [float("-inf"), 2, 3, 4]),
    ],
)
def test_boxes_that_are_none_stop(tmp_path, bbox):
    paths = write_set(tmp_path, [annotation(1), annotation(7, 2, bbox=bbox)])
    message = error_of(*paths)
    has = "none" if bbox is None else "has "
    assert "list of four finite numbers (1): id 7 (image 2, 2.png) has" in message
    assert has in message and paths[0] in message


@pytest.mark.fault(43)
def test_all_problems_are_told_at_once_with_ten_ids_and_the_total(tmp_path):
    many = [annotation(i, category_id=8) for i in range(100, 125)]
    json_file, images = write_set(tmp_path, [*many, annotation(1, image_id=5)])
    (Path(images) / "2.png").unlink()
    message = error_of(json_file, images)
    assert "(1, 2) (25): id 100 (image 1, 1.png) has 8, id 101" in message
    assert "id 109 (image 1, 1.png) has 8, ...\n" in message and "id 110" not in message
    assert "not among the images (1): id 1 (image 5) has 5" in message
    assert f"images that are not in {images} (1): id 2 (2.png)" in message


def test_faults_of_images_do_not_hide_those_of_annotations(tmp_path):
    json_file, images = write_set(
        tmp_path,
        [annotation(1, 3), annotation(2, 3, bbox=[1]), annotation(3), annotation(4, 9)],
        images=[
            {"id": 1, "file_name": "1.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "2.png", "width": None, "height": 30},
        ],
    )
    message = error_of(json_file, images)
    assert message.count("\n- ") == 3
    assert "positive integer 'width' (1): id 3 (2.png)" in message
    assert "four finite numbers (1): id 2 (image 3, 2.png) has [1]" in message
    assert "not among the images (1): id 4 (image 9)" in message  # and not those of image 3
    report = examine_coco(json_file, images)
    assert [i["id"] for i in report.images] == [1]
    assert [a["id"] for a in report.annotations] == [3]


def test_what_pycocotools_takes_is_taken(tmp_path):
    images = [{"id": 1.0, "file_name": "1.png", "width": 40.0, "height": 30}]
    entry = annotation("a", 1.0, 2.0, iscrowd=False, area=12.5)
    report = check_coco(*write_set(tmp_path, [entry], images=images))
    assert report.images == [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}]
    expected = annotation("a", 1, 2, iscrowd=0, area=12.5, bbox=[2.0, 3.0, 10.0, 8.0])
    assert repr(report.annotations) == repr([expected])  # and no 1.0


@pytest.mark.fault(43)
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
    assert "id 1 (part/one/1.png)" in error_of(json_file, images)
    (Path(images) / "part" / "one").mkdir(parents=True)
    (Path(images) / "1.png").rename(Path(images) / "part" / "one" / "1.png")
    check_coco(json_file, images)


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"file_name": "1.png", "width": 4, "height": 4}, "images without an 'id'"),
        ({"id": 1, "file_name": "1.png", "width": 4, "height": 4}, "more than once (1): 1"),
        ({"id": "x", "file_name": "1.png", "width": 4, "height": 4}, "and others strings"),
        ({"id": 3, "width": 4, "height": 4}, "images without a 'file_name' (1): id 3"),
        ({"id": 3, "file_name": "1.png", "height": 4}, "integer 'width' (1): id 3 (1.png)"),
        ({"id": 3, "file_name": "1.png", "width": 4, "height": 0}, "integer 'height' (1): id 3"),
        ({"id": 3, "file_name": "1.png", "width": 4.5, "height": 1}, "integer 'width' (1): id 3"),
        ({"id": 3, "file_name": "1.png", "width": True, "height": 1}, "integer 'width' (1): id 3"),
        ([3], "entries of the section 'images' that are not objects (1): number 1 ([3])"),
    ],
)
def test_faulty_images_stop(tmp_path, entry, text):
    good = {"id": 1, "file_name": "1.png", "width": 40, "height": 30}
    paths = write_set(tmp_path, [annotation(1)], images=[good, entry])
    assert text in error_of(*paths)


@pytest.mark.fault(36)
@pytest.mark.fault(48)
@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"annotations": None}, "the section 'annotations' is missing"),
        ({"annotations": {"1": 2}}, "the section 'annotations' is a dict, not a list of objects"),
        ({"annotations": []}, "the section 'annotations' is empty"),
        ({"annotations": [annotation(1, bbox=[5, 5, 0, 0])]}, "it holds no box that can be used"),
        ({"images": None}, "the section 'images' is missing"),
        ({"images": []}, "the section 'images' is empty"),
        ({"categories": None}, "the section 'categories' is missing"),
        ({"categories": []}, "the section 'categories' is empty"),
        (
            {"categories": [{"id": 1}]},
            "integer 'id' of 0 or more and a string 'name' (1): {'id': 1}",
        ),
    ],
)
def test_missing_sections(tmp_path, sections, text):
    json_file, images = write_set(tmp_path, [annotation(1)])
    content = {**json.loads(Path(json_file).read_text()), **sections}
    content = {name: section for name, section in content.items() if section is not None}
    Path(json_file).write_text(json.dumps(content))
    message = error_of(json_file, images)
    assert text in message and json_file in message


def test_missing_sections_are_told_together(tmp_path):
    (tmp_path / "set.json").write_text("{}")
    message = error_of(str(tmp_path / "set.json"), str(tmp_path))
    for name in ("images", "annotations", "categories"):
        assert f"the section '{name}' is missing" in message


def with_file_name(tmp_path, file_name):
    """A set below tmp_path/set whose first image has this name; images also lie beside the set."""
    json_file, images = write_set(tmp_path / "set", [annotation(1)])
    write_set(tmp_path / "other", [annotation(1)])
    content = json.loads(Path(json_file).read_text())
    content["images"][0]["file_name"] = file_name
    Path(json_file).write_text(json.dumps(content))
    return json_file, images


@pytest.mark.fault(47)
@pytest.mark.parametrize(
    "file_name",
    [
        "../../other/images/1.png",
        "{tmp_path}/other/images/1.png",
        "link/../1.png",  # as the system sees it: beside the folder that the link leads to
        "../images2/1.png",
    ],
)
def test_names_that_lead_outside_are_errors(tmp_path, file_name):
    file_name = file_name.format(tmp_path=tmp_path)
    json_file, images = with_file_name(tmp_path, file_name)
    (tmp_path / "other" / "images" / "sub").mkdir()
    (Path(images) / "link").symlink_to(tmp_path / "other" / "images" / "sub")
    (tmp_path / "set" / "images2").symlink_to(tmp_path / "other" / "images")
    message = error_of(json_file, images)
    assert f"'file_name' leads outside {images} (1): id 1 (" in message and "1.png" in message


@pytest.mark.parametrize("file_name", ["sub/../1.png", "./1.png", "{images}/1.png", "link/1.png"])
def test_links_and_detours_inside_are_legal(tmp_path, file_name):
    images = tmp_path / "set" / "images"
    json_file, _ = with_file_name(tmp_path, file_name.format(images=images))
    (images / "sub").mkdir()
    (images / "link").symlink_to(tmp_path / "other" / "images")
    check_coco(json_file, str(images))
    (tmp_path / "linked").symlink_to(images)
    check_coco(json_file, str(tmp_path / "linked"))


@pytest.mark.fault(43)
@pytest.mark.parametrize("file_name", ["", "..", "sub", "broken", "a\0b/1.png", "\ud800/1.png"])
def test_names_that_are_no_files_are_missing(tmp_path, file_name):
    json_file, images = with_file_name(tmp_path, file_name)
    (Path(images) / "sub").mkdir()
    (Path(images) / "broken").symlink_to(tmp_path / "nowhere")
    message = error_of(json_file, images)
    assert "(1): id 1 (" in message
    message.encode()  # can be printed


def test_a_file_that_several_images_share_is_mentioned(tmp_path, caplog):
    same = [{"id": i, "file_name": "1.png", "width": 40, "height": 30} for i in (1, 2)]
    check_coco(*write_set(tmp_path, [annotation(1)], images=same))
    assert "files that several images share (1): 1.png (ids 1, 2)" in caplog.text


def test_annotations_are_completed_for_pycocotools():
    entries = [{"bbox": [1, 2, 3, 4]}, {"bbox": [1, 2, 3, 4], "area": 5, "iscrowd": 1}]
    entries += [{"bbox": [1, 2, 3, 4], "area": None, "iscrowd": None}]
    assert complete_annotations(entries) == 2
    assert entries[0] == {"bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
    assert entries[1]["area"] == 5 and entries[2] == entries[0]


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
