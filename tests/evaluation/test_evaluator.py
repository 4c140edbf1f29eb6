"""Box AP from pycocotools, and what is refused before it is computed."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dn_detr.evaluation.checking import Collected, EvaluationError, merge
from dn_detr.evaluation.evaluator import build_evaluator

BOXES = {1: [[10, 10, 30, 20], [40, 40, 20, 20]], 2: [[5, 50, 40, 30]], 3: []}  # xywh


@pytest.fixture
def dataset(tmp_path):
    """Three images, categories 2, 5 and 7; objects are 2 and 7 in turn."""
    annotations = [
        {"image_id": image, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for image, boxes in BOXES.items()
        for box in boxes
    ]
    for index, annotation in enumerate(annotations):
        annotation.update(id=index + 1, category_id=(2, 7)[index % 2])
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in BOXES],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"c{i}"} for i in (2, 5, 7)],
    }
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    return str(path), content


def evaluate(path, detections, img_ids=None, repeat=(), **kwargs):
    """detections: image id -> list of (xyxy box, score, class); repeat: ids to process again."""
    evaluator = build_evaluator(path, "images", **kwargs)
    evaluator.reset()
    for image in [*detections, *repeat]:
        found = detections[image]
        instances = Instances((100, 100))
        instances.pred_boxes = Boxes(torch.tensor([f[0] for f in found]).reshape(-1, 4).float())
        instances.scores = torch.tensor([float(f[1]) for f in found])
        instances.pred_classes = torch.tensor([f[2] for f in found], dtype=torch.long)
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate(img_ids)


def perfect(content, class_of, shift=0):
    detections = {image["id"]: [] for image in content["images"]}
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        box = [x + shift, y, x + w + shift, y + h]
        detections[a["image_id"]].append((box, 0.9, class_of[a["category_id"]]))
    return detections


def test_perfect_detections_have_ap_100(dataset):
    path, content = dataset
    results = evaluate(path, perfect(content, {2: 0, 5: 1, 7: 2}))["bbox"]
    assert results["AP"] == pytest.approx(100)
    assert results["AP-c2"] == pytest.approx(100) and "AP-c5" in results


def test_classes_that_are_category_ids(dataset):
    path, content = dataset
    ids = {i: i for i in (2, 5, 7)}
    results = evaluate(path, perfect(content, ids), num_classes=8)["bbox"]
    assert results["AP"] == pytest.approx(100)
    assert {name for name in results if "-" in name} == {"AP-c2", "AP-c5", "AP-c7"}


def test_figures_are_those_of_pycocotools(dataset, tmp_path):
    path, content = dataset
    detections = perfect(content, {2: 0, 5: 1, 7: 2}, shift=4)
    detections[3] = [([1, 1, 50, 50], 0.95, 0)]
    results = evaluate(path, detections, output_dir=str(tmp_path / "out"))["bbox"]
    truth = COCO(path)
    reference = COCOeval(
        truth, truth.loadRes(str(tmp_path / "out" / "coco_instances_results.json")), "bbox"
    )
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    assert 0 < results["AP"] < 100
    for index, name in enumerate(("AP", "AP50", "AP75")):
        assert results[name] == pytest.approx(100 * reference.stats[index])


@pytest.mark.fault(64)
def test_no_detection_is_ap_0_and_said(dataset, caplog, fresh_logs):
    path, _ = dataset
    results = evaluate(path, {1: [], 2: [], 3: []})["bbox"]
    assert results["AP"] == results["AP50"] == results["AP-c7"] == 0.0
    assert "The model predicts no box in any image: AP is 0." in caplog.text


BOX, NAN, INF = [10.0, 10.0, 40.0, 30.0], float("nan"), float("inf")


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    "found, parts",
    [
        (([NAN, 10, 40, 30], 0.9, 0), ["boxes that are NaN or infinite", "train.amp"]),
        (([10, 10, INF, 30], 0.9, 0), ["boxes that are NaN or infinite", "NaN in the weights"]),
        (([40, 10, 10, 30], 0.9, 0), ["boxes with a negative side"]),
        ((BOX, NAN, 0), ["scores that are NaN or infinite"]),
        ((BOX, -INF, 0), ["scores that are NaN or infinite"]),
        ((BOX, 0.9, 3), ["classes outside 0..2", "model.num_classes"]),
        ((BOX, 0.9, -1), ["classes outside 0..2"]),
    ],
)
def test_values_that_cannot_be_compared_have_no_ap(dataset, tmp_path, found, parts):
    path, content = dataset
    detections = perfect(content, {2: 0, 5: 1, 7: 2})
    detections[2] += [found, found]
    with pytest.raises(EvaluationError) as info:
        evaluate(path, detections, output_dir=str(tmp_path / "out"))
    lines = str(info.value).splitlines()
    assert len(lines) == 2 and path in lines[0] and "3 images" in lines[0]
    assert lines[1].startswith("- image 2: ")
    for part in parts:
        assert part in lines[1]
    assert not (tmp_path / "out").exists()  # nothing of an earlier evaluation is replaced


def test_a_class_without_a_category_is_legal_where_classes_are_ids(dataset):
    """COCO's 91 classes: pycocotools passes over the 11 gaps."""
    path, content = dataset
    detections = perfect(content, {i: i for i in (2, 5, 7)})
    detections[3] = [(BOX, 0.9, 6)]
    assert evaluate(path, detections, num_classes=8)["bbox"]["AP"] == pytest.approx(100)
    with pytest.raises(EvaluationError, match=r"classes outside 0\.\.7"):
        evaluate(path, {**detections, 3: [(BOX, 0.9, 8)]}, num_classes=8)


@pytest.mark.fault(64)
def test_every_image_has_to_be_predicted_once(dataset):
    path, content = dataset
    detections = perfect(content, {2: 0, 5: 1, 7: 2})
    with pytest.raises(EvaluationError) as info:
        evaluate(path, {9: [], 2: detections[2]}, repeat=[2])
    head, *lines = str(info.value).splitlines()
    assert "3 images" in head and "1 process)" in head
    assert [line[: line.index(". ") + 1] for line in lines] == [
        "- 2 images (1, 3): no prediction.",
        "- image 9: not among those to evaluate.",
        "- image 2: predicted twice by one process.",
    ]
    assert "evaluate(img_ids=...)" in lines[0] and "dataloader.evaluator" in lines[1]
    with pytest.raises(EvaluationError, match="3 images .*: no prediction"):
        evaluate(path, {})


def test_a_part_of_the_images_can_be_asked_for(dataset):
    path, content = dataset
    detections = perfect(content, {2: 0, 5: 1, 7: 2})
    part = {image: detections[image] for image in (2, 3)}
    assert evaluate(path, part, img_ids=[2, 3])["bbox"]["AP"] == pytest.approx(100)
    with pytest.raises(EvaluationError, match="image 1: not among those to evaluate"):
        evaluate(path, detections, img_ids=[2, 3])
    with pytest.raises(EvaluationError, match="image 3: no prediction"):
        evaluate(path, {2: part[2]}, img_ids=[2, 3])


def collected(*images_by_process, faults=()):
    """One prediction for every id; it says which process it is from."""
    return [
        Collected([{"image_id": i, "instances": [rank]} for i in images], dict(faults))
        for rank, images in enumerate(images_by_process)
    ]


@pytest.mark.fault(64)
@pytest.mark.fault(65)
@pytest.mark.parametrize(
    "processes, images",
    [
        ([[0, 2, 4], [1, 3, 0]], 5),  # torch's DistributedSampler on 5 images and 2 processes
        ([[0, 3], [1, 4], [2, 0]], 5),
        ([[0], [0], [0]], 1),
        ([[0], [1], [0], [1]], 2),
        ([[0], []], 1),  # detectron2's InferenceSampler
    ],
)
def test_repetitions_that_even_out_processes_count_once(processes, images):
    merged = merge(collected(*processes), range(images), "val.json")
    assert sorted(p["image_id"] for p in merged) == list(range(images))
    first = {i: next(r for r, ids in enumerate(processes) if i in ids) for i in range(images)}
    assert {p["image_id"]: p["instances"][0] for p in merged} == first


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    "processes, part",
    [
        ([[0, 1, 2], [0, 1, 2]], r"3 images \(0, 1, 2\): predicted by several processes"),
        ([[0, 1, 2, 0], []], "image 0: predicted twice by one process"),
        ([[0, 1, 1], [2, 1]], "image 1: predicted twice by one process"),
    ],
)
def test_other_repetitions_are_refused(processes, part):
    with pytest.raises(EvaluationError, match=part):
        merge(collected(*processes), range(3), "val.json")


def test_of_many_images_the_first_ids_are_shown():
    with pytest.raises(EvaluationError) as info:
        merge(collected([5], range(5, 300)), range(1000), "val.json")
    assert "705 images (0, 1, 2, 3, 4, 300, 301, 302, 303, 304, ...): no pred" in str(info.value)
    faults = {"boxes that are NaN": [7, 3, 7]}
    with pytest.raises(EvaluationError, match=r"2 images \(3, 7\): boxes that are NaN"):
        merge(collected(range(9), faults=faults), range(9), "val.json")


@pytest.mark.fault(42)
def test_categories_of_one_name_have_results_of_their_own(dataset):
    path, content = dataset
    for category in content["categories"]:
        category["name"] = "cat" if category["id"] > 2 else "dog"
    Path(path).write_text(json.dumps(content))
    expected = {"AP-dog", "AP-cat (id 5)", "AP-cat (id 7)"}
    for detections in (perfect(content, {2: 0, 5: 1, 7: 2}), {1: [], 2: [], 3: []}):
        results = evaluate(path, detections)["bbox"]
        assert {name for name in results if "-" in name} == expected


def test_annotations_without_iscrowd_and_area_are_evaluated(dataset):
    path, content = dataset
    for annotation in content["annotations"]:
        del annotation["iscrowd"], annotation["area"]
    Path(path).write_text(json.dumps(content))
    assert evaluate(path, perfect(content, {2: 0, 7: 2}))["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("new_id", [lambda i: i, lambda i: f"box {i}"], ids=["from 0", "text"])
def test_any_annotation_ids_are_evaluated(dataset, new_id):
    """pycocotools writes them into arrays of numbers, and takes 0 for "not found"."""
    path, content = dataset
    for index, annotation in enumerate(content["annotations"]):
        annotation["id"] = new_id(index)
    Path(path).write_text(json.dumps(content))
    assert evaluate(path, perfect(content, {2: 0, 7: 2}))["bbox"]["AP"] == pytest.approx(100)
