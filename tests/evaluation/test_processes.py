"""How many processes and images a batch there are changes neither predictions nor AP."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch.utils.data import DistributedSampler, SequentialSampler

from dn_detr.data.datasets import detection_dicts
from dn_detr.data.mapper import DetrDatasetMapper
from dn_detr.engine.distributed import SharedError
from dn_detr.evaluation.checking import EvaluationError
from dn_detr.evaluation.evaluator import build_evaluator
from tests.data.coco_files import annotation, write_set
from tests.meta_arch.small import small_model
from tests.processes import finish, start_ranks

FAMILIES = ("dn_detr", "dino")
SETS = {"equal": [(96, 64)] * 5, "sizes": [(96, 64), (64, 96), (80, 72)], "one": [(128, 96)]}
CATEGORIES = [(3, "a"), (5, "b"), (9, "c")]  # as many as the model has classes


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the processes that the tests start: sums in another order differ in the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def predict(folder, output, family, batch_size=1, sampler=None, dtype=torch.float32, **changes):
    """Evaluates a small model; writes its predictions to `output`."""
    json_file, images = str(folder / "set.json"), str(folder / "images")
    model = small_model(family, detections_per_image=10, **changes).to(dtype)
    loader = build_detection_test_loader(
        detection_dicts(json_file, images),
        mapper=DetrDatasetMapper(is_train=False, augmentations=[], image_format="RGB"),
        sampler=sampler,
        batch_size=batch_size,
        num_workers=0,
    )
    evaluator = build_evaluator(json_file, images, output_dir=str(output))
    return inference_on_dataset(model, loader, evaluator)


def predictions(output):
    return json.loads((output / "coco_instances_results.json").read_text())


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """{(family, name): (folder, results of one process)}; objects are what the model finds."""
    made = {}
    for family in FAMILIES:
        for name, sizes in SETS.items():
            folder = tmp_path_factory.mktemp(f"{family}-{name}")
            anything = [annotation(1, category_id=3)]
            write_set(folder, anything, sizes=sizes, categories=CATEGORIES)
            predict(folder, folder / "first", family)
            found = [p for p in predictions(folder / "first") if min(p["bbox"][2:]) > 2]
            objects = [
                annotation(i + 1, p["image_id"], p["category_id"], bbox=p["bbox"], area=None)
                for i, p in enumerate(found[::3])
            ]
            write_set(folder, objects, sizes=sizes, categories=CATEGORIES)
            made[family, name] = folder, predict(folder, folder / "alone", family)
    return made


def evaluate_in_two_processes(folders):
    for (family, _), folder in folders.items():
        number = len(detection_dicts(str(folder / "set.json"), str(folder / "images")))
        padded = DistributedSampler(range(number), 2, comm.get_rank(), shuffle=False)
        for name, sampler in (("two", None), ("padded", padded)):
            results = predict(folder, folder / name, family, sampler=sampler)
            if comm.is_main_process():
                (folder / name / "results.json").write_text(json.dumps(results))
            assert bool(results) == comm.is_main_process()


@pytest.mark.fault(65)
def test_two_processes_predict_like_one(sets, tmp_path):
    """5, 3 and 1 images on 2 processes; the second one may have none, or repeat one."""
    folders = {key: folder for key, (folder, _) in sets.items()}
    ranks = start_ranks(2, evaluate_in_two_processes, folders, folder=tmp_path)
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "stderr0").read_text()
    for key, (folder, results) in sets.items():
        expected = sorted(predictions(folder / "alone"), key=lambda p: p["image_id"])
        assert 0 < results["bbox"]["AP"] <= 100
        for name in ("two", "padded"):
            found = sorted(predictions(folder / name), key=lambda p: p["image_id"])
            assert found == expected, (key, name)
            again = json.loads((folder / name / "results.json").read_text())
            assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True, abs=1e-9)


@pytest.mark.fault(65)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["equal", "sizes"])
def test_batches_of_three_predict_like_one(sets, tmp_path, family, name):
    """By default each image has a pass of its own."""
    folder, results = sets[family, name]
    again = predict(folder, tmp_path, family, batch_size=3)
    assert predictions(tmp_path) == predictions(folder / "alone")
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True, abs=0)


@pytest.mark.fault(65)
@pytest.mark.parametrize(
    # Random proposals enlarge what float32 rounds: there it would be 1e-4 with luck.
    "family, dtype, tolerance",
    [("dn_detr", torch.float32, 1e-4), ("dino", torch.float64, 1e-6)],
)
def test_several_images_in_one_pass_predict_like_one(sets, tmp_path, family, dtype, tolerance):
    """Of one size: the last digits differ."""
    folder, _ = sets[family, "equal"]
    alone = predict(folder, tmp_path / "alone", family, dtype=dtype)
    again = predict(
        folder, tmp_path / "batch", family, batch_size=3, dtype=dtype, detect_one_by_one=False
    )
    pairs = list(zip(predictions(tmp_path / "alone"), predictions(tmp_path / "batch"), strict=True))
    assert pairs
    for a, b in pairs:
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert b["score"] == pytest.approx(a["score"], rel=0, abs=tolerance)
        assert b["bbox"] == pytest.approx(a["bbox"], rel=0, abs=64 * tolerance)  # of the image
    assert again["bbox"] == pytest.approx(alone["bbox"], nan_ok=True, abs=1e-4)


def evaluate_all_images_in_each_process(folder: Path):
    """Both processes have to stop: the one without an own error with that of the main process."""
    number = len(detection_dicts(str(folder / "set.json"), str(folder / "images")))
    error = EvaluationError if comm.is_main_process() else SharedError
    with pytest.raises(error, match=f"{number} images .*: predicted by several processes"):
        predict(folder, folder / "wrong", "dn_detr", sampler=SequentialSampler(range(number)))
    evaluator = build_evaluator(str(folder / "set.json"), str(folder / "images"))
    evaluator.reset()
    if not comm.is_main_process():
        boxes = torch.tensor([[0.0, 0.0, float("nan"), 1.0]])
        evaluator.process(*outputs_of(range(1, number + 1), boxes))
    with pytest.raises(error, match=f"{number} images .*: boxes that are NaN or infinite"):
        evaluator.evaluate()
    print("refused twice")


def outputs_of(image_ids, boxes):
    from detectron2.structures import Boxes, Instances

    instances = Instances((9, 9), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.long)
    return [{"image_id": i} for i in image_ids], [{"instances": instances} for _ in image_ids]


@pytest.mark.fault(64)
def test_all_processes_stop_where_predictions_are_refused(sets, tmp_path):
    folder, _ = sets["dn_detr", "equal"]
    ranks = start_ranks(2, evaluate_all_images_in_each_process, folder, folder=tmp_path)
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "stderr0").read_text()
    for rank in range(2):
        assert "refused twice" in (tmp_path / f"stdout{rank}").read_text()
    assert not (folder / "wrong").exists()
