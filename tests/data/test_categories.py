"""Categories, numbers of images, and which class a category is. Needs no detectron2."""

import json

import pytest

from dn_detr.data.categories import (
    DatasetError,
    class_mapping,
    count_images,
    read_categories,
    unusual_categories,
)

from .coco_files import annotation, write_set

CATEGORIES = [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 6, "name": "bird"}]


def test_categories_are_sorted_by_id(tmp_path):
    json_file, _ = write_set(tmp_path, [annotation(1)], categories=((9, "b"), (3, "a")))
    assert read_categories(json_file) == [{"id": 3, "name": "a"}, {"id": 9, "name": "b"}]
    assert count_images(json_file) == 2


def test_a_changed_file_is_read_again(tmp_path):
    json_file, _ = write_set(tmp_path, [annotation(1)])
    assert count_images(json_file) == 2
    write_set(tmp_path, [annotation(1)], sizes=((40, 30),), categories=((1, "bird"),))
    assert count_images(json_file) == 1
    assert read_categories(json_file) == [{"id": 1, "name": "bird"}]


@pytest.mark.parametrize("num_classes", [None, 3])
def test_classes_follow_each_other(num_classes):
    names, class_of = class_mapping(CATEGORIES, num_classes)
    assert names == ["cat", "dog", "bird"]
    assert class_of == {2: 0, 5: 1, 6: 2}


def test_classes_are_the_category_ids():
    names, class_of = class_mapping(CATEGORIES, 7)
    assert names == ["N/A", "N/A", "cat", "N/A", "N/A", "dog", "bird"]
    assert class_of == {2: 2, 5: 5, 6: 6}


@pytest.mark.parametrize("num_classes", [0, 2, 4, 6, 8])
def test_another_number_of_classes_is_an_error_with_the_numbers(num_classes):
    with pytest.raises(DatasetError) as error:
        class_mapping(CATEGORIES, num_classes, source="my.json")
    for text in (f"model.num_classes={num_classes},", "my.json has 3", "up to 6", "null", " 7 for"):
        assert text in str(error.value)


def test_a_missing_file_is_named_with_the_variable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", "/somewhere/else")
    with pytest.raises(DatasetError) as error:
        read_categories("coco/instances.json")
    assert str(tmp_path / "coco" / "instances.json") in str(error.value)
    assert "DETECTRON2_DATASETS is '/somewhere/else'" in str(error.value)
    monkeypatch.delenv("DETECTRON2_DATASETS")
    with pytest.raises(DatasetError, match="DETECTRON2_DATASETS is not set"):
        count_images("coco/instances.json")


@pytest.mark.fault(35)
@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [', r"not valid JSON: .* at byte 12 of 12 .* was it cut off"),
        ('{"name": "é", "images": ['.encode(), r"at byte 26 of 26"),
        (b'{"images": [}', r"at byte 12 of 13 \(line 1\)"),
        (b"", r"it is empty \(0 bytes\)"),
        (b" \n", r"it is empty"),
        (b"<html>", r"not valid JSON: .* at byte 0 of 6 .* stands '<html>'"),
        (b'{"a": "\xff"}', r"cannot be read as text: .*position 7"),
        (b"[" * 100_000, "is no annotation file: .*recursion"),
        (b"[1, 2]", "holds a list"),
        (b"7", "holds a int"),
        (b'{"images": []}', "section 'categories' is missing"),
        (b'{"images": [], "categories": []}', "section 'categories' is empty"),
        (b'{"categories": [{"id": 1, "name": "a"}]}', "no section 'images' that is a list"),
        (b'{"images": [], "categories": [{"id": "1", "name": "a"}]}', "integer 'id'"),
        (b'{"images": [], "categories": [{"id": 1}]}', "string 'name'"),
        (b'{"images": [], "categories": [{"id": true, "name": "a"}]}', "integer 'id'"),
    ],
)
def test_broken_files(tmp_path, content, message):
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as error:
        read_categories(str(file))
    assert str(file) in str(error.value)
    assert file.read_bytes() == content


def test_repeated_category_ids(tmp_path):
    file = tmp_path / "twice.json"
    categories = [{"id": 1, "name": "a"}, {"id": 1.0, "name": "b"}]
    file.write_text(json.dumps({"images": [], "categories": categories}))
    with pytest.raises(DatasetError, match=r"category ids given more than once \(1\): 1"):
        read_categories(str(file))


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("ids", "names", "num_classes", "text"),
    [
        ((0, 1), "ab", None, "ids start at 0. class: category is 0: id 0 'a', 1: id 1 'b'"),
        ((3, 4), "ab", None, "ids start at 3"),
        ((1, 3), "ab", None, "have gaps (2 ids up to 3). class: category is 0: id 1 'a', 1: id 3"),
        ((1, 3), "ab", 4, "have gaps (2 ids up to 3). class: category is 1: id 1 'a', 3: id 3 'b'"),
        ((1, 2), "aa", None, "several categories are called a. class: category is 0: id 1 'a', 1"),
        (range(90), "a" * 90, None, "0: id 0 'a', 1: id 1 'a', 2: id 2 'a', 3: id 3 'a', 4: id 4"),
    ],
)
def test_unusual_categories_come_with_their_classes(ids, names, num_classes, text):
    categories = [{"id": i, "name": n} for i, n in zip(ids, names)]
    finding = unusual_categories(categories, num_classes)
    assert text in str(finding) and finding.level == "note"
    assert len(str(finding)) < 400


def test_usual_categories_need_no_word():
    assert unusual_categories([{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]) is None


def test_a_folder_is_not_an_annotation_file(tmp_path):
    with pytest.raises(DatasetError, match="cannot be read"):
        read_categories(str(tmp_path))
