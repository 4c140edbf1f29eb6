"""Box AP from pycocotools."""

import json
import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

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


def evaluate(path, detections, **kwargs):
    """detections: image id -> list of (xyxy box, score, class)."""
    evaluator = build_evaluator(path, "images", **kwargs)
    evaluator.reset()
    for image, found in detections.items():
        instances = Instances((100, 100))
        instances.pred_boxes = Boxes(torch.tensor([f[0] for f in found]).reshape(-1, 4).float())
        instances.scores = torch.tensor([float(f[1]) for f in found])
        instances.pred_classes = torch.tensor([f[2] for f in found], dtype=torch.long)
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate()


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


@pytest.mark.parametrize("detections", [{1: [], 2: [], 3: []}, {}])
def test_no_detection_is_ap_0_and_said(dataset, detections, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dn_detr"), "propagate", True)  # off after setup_logger
    path, _ = dataset
    results = evaluate(path, detections)["bbox"]
    assert results["AP"] == results["AP50"] == results["AP-c7"] == 0.0
    assert "The model predicts no box in any image: AP is 0." in caplog.text


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
