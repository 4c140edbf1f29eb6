"""COCO-format sets in detectron2's terms."""

import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402

from dn_detr.data.categories import DatasetError  # noqa: E402
from dn_detr.data.datasets import detection_dicts, register_coco  # noqa: E402

from .coco_files import annotation, write_set  # noqa: E402

GAPPED = ((2, "cat"), (7, "dog"))


def gapped_set(tmp_path):
    return write_set(
        tmp_path,
        [
            annotation(1, 2, 7, bbox=[25, 40, 50, 50]),
            annotation(2, 2, 2, iscrowd=1),
            annotation(3, 2, 2, bbox=[5, 5, 0, 5]),
            annotation(4, 3, 2, segmentation=[[1, 2]]),
        ],
        sizes=((40, 30), (30, 50), (60, 20)),
        categories=GAPPED,
    )


def test_dicts_are_detectron2s(tmp_path):
    json_file, images = gapped_set(tmp_path)
    one, two, three = detection_dicts(json_file, images)
    assert one == {
        "file_name": str(Path(images) / "1.png"),
        "height": 30,
        "width": 40,
        "image_id": 1,
        "annotations": [],
    }
    xywh = BoxMode.XYWH_ABS
    assert two["annotations"] == [
        {"bbox": [25, 40, 5, 10], "bbox_mode": xywh, "category_id": 1, "iscrowd": 0},
        {"bbox": [2, 3, 10, 8], "bbox_mode": xywh, "category_id": 0, "iscrowd": 1},
    ]
    # detectron2's own reader drops boxes whose outline is too short; a detector needs only the box.
    assert [a["category_id"] for a in three["annotations"]] == [0]


def test_order_is_that_of_the_image_ids(tmp_path):
    json_file, images = gapped_set(tmp_path)
    content = json.loads(Path(json_file).read_text())
    content["images"].reverse()
    Path(json_file).write_text(json.dumps(content))
    assert [d["image_id"] for d in detection_dicts(json_file, images)] == [1, 2, 3]


def test_classes_as_category_ids(tmp_path):
    dicts = detection_dicts(*gapped_set(tmp_path), num_classes=8)
    assert [a["category_id"] for d in dicts for a in d["annotations"]] == [7, 2, 2]


def test_wrong_number_of_classes(tmp_path):
    json_file, images = gapped_set(tmp_path)
    for read in (detection_dicts, register_coco):
        with pytest.raises(DatasetError) as error:
            read(json_file, images, 5)
        assert "model.num_classes=5" in str(error.value)
        assert f"{json_file} has 2 categories with ids up to 7" in str(error.value)


@pytest.mark.fault(42)
def test_repairs_and_classes_are_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("dn_detr.data.check._logged", set())
    for _ in range(2):
        detection_dicts(*gapped_set(tmp_path), num_classes=8)
    (classes,) = [r.getMessage() for r in caplog.records if "class: category" in r.getMessage()]
    assert "category ids have gaps (2 ids up to 7)" in classes
    assert "2: id 2 'cat', 7: id 7 'dog'" in classes
    (repairs,) = [r.getMessage() for r in caplog.records if "repairs" in r.getMessage()]
    assert "clipped (1)" in repairs and "dropped (1)" in repairs


@pytest.mark.fault(39)
def test_strict_is_an_argument(tmp_path):
    with pytest.raises(DatasetError, match="not clipped, since strict"):
        detection_dicts(*gapped_set(tmp_path), strict=True)


@pytest.mark.parametrize(
    ("num_classes", "names", "class_of"),
    [
        (None, ["cat", "dog"], {2: 0, 7: 1}),
        (2, ["cat", "dog"], {2: 0, 7: 1}),
        (8, ["N/A", "N/A", "cat", "N/A", "N/A", "N/A", "N/A", "dog"], {i: i for i in range(8)}),
    ],
)
def test_registration(tmp_path, num_classes, names, class_of):
    json_file, images = gapped_set(tmp_path)
    name = register_coco(json_file, images, num_classes)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == names
    assert metadata.thing_dataset_id_to_contiguous_id == class_of
    assert (metadata.json_file, metadata.image_root) == (json_file, images)
    assert metadata.evaluator_type == "coco"
    assert DatasetCatalog.get(name) == detection_dicts(json_file, images, num_classes)
    assert register_coco(json_file, images, num_classes) == name


def test_registration_follows_the_file(tmp_path):
    json_file, images = write_set(tmp_path, [annotation(1)])
    name = register_coco(json_file, images)
    write_set(tmp_path, [annotation(1)], categories=((1, "a"), (2, "b"), (3, "c")))
    assert register_coco(json_file, images) == name
    assert MetadataCatalog.get(name).thing_classes == ["a", "b", "c"]


def test_names_differ_where_the_sets_do(tmp_path):
    first = write_set(tmp_path / "first", [annotation(1)])
    second = write_set(tmp_path / "second", [annotation(1)])
    names = {
        register_coco(*first),
        register_coco(*first, 3),
        register_coco(*second),
        register_coco(first[0], second[1]),
    }
    assert len(names) == 4


def test_registration_reads_no_images(tmp_path):
    json_file, _ = write_set(tmp_path, [annotation(1)])
    name = register_coco(json_file, str(tmp_path / "not" / "there"))
    with pytest.raises(DatasetError, match="there is no folder"):
        DatasetCatalog.get(name)
