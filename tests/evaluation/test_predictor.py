"""Predictions on single images equal those of the evaluation; pictures and tools on top."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.config import instantiate
from detectron2.engine import default_argument_parser

from dn_detr.checkpoint.checkpointer import DNCheckpointer, build_metadata
from dn_detr.checkpoint.reading import CheckpointError
from dn_detr.data.categories import DatasetError
from dn_detr.engine.config import load_config
from dn_detr.engine.main import main
from dn_detr.evaluation.pictures import draw_images, draw_validation
from dn_detr.evaluation.predictor import Predictor, find_images, find_weights, read_rgb

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "tests" / "engine" / "tiny_config.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """(overrides, folder) of one training of the stand-in detector, with EMA."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = [f"dataset.root={folder / 'shapes'}", f"train.output_dir={folder}"]
    options = ["--config-file", CONFIG, *overrides, "train.ema.enabled=True"]
    main(default_argument_parser().parse_args(options))
    return overrides, folder


@pytest.fixture
def predictor(trained: tuple[list[str], Path]) -> Predictor:
    overrides, folder = trained
    return Predictor(load_config(CONFIG, overrides), str(folder / "model_final.pth"))


def test_predictions_are_those_of_the_evaluation(trained, predictor: Predictor) -> None:
    _, folder = trained
    evaluated = json.loads((folder / "inference_ema" / "coco_instances_results.json").read_text())
    entries = json.loads((folder / "shapes" / "val.json").read_text())["images"]
    for entry in entries:
        found = predictor(read_rgb(folder / "shapes" / "val" / entry["file_name"]))
        theirs = [e for e in evaluated if e["image_id"] == entry["id"]]
        theirs.sort(key=lambda e: -e["score"])
        assert found.scores.tolist() == pytest.approx([e["score"] for e in theirs], abs=1e-5)
        boxes = np.array([e["bbox"] for e in theirs])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(found.pred_boxes.tensor, boxes, atol=1e-3)


def test_raw_weights_can_be_asked_for(trained, predictor: Predictor) -> None:
    overrides, folder = trained
    path = str(folder / "model_final.pth")
    raw = Predictor(load_config(CONFIG, overrides), path, averaged=False)
    saved = torch.load(path, weights_only=True)
    for name, value in raw.model.state_dict().items():
        assert torch.equal(value.cpu(), saved["model"][name])
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value.cpu(), saved["ema"]["model"][name])
    assert "averaged" in predictor.source and "averaged" not in raw.source


def test_classes_come_from_the_checkpoint(trained, predictor: Predictor, tmp_path: Path) -> None:
    """The data of the config need not be there."""
    overrides, folder = trained
    assert predictor.class_names == ["circle", "square", "triangle", "star", "ring"]
    elsewhere = load_config(CONFIG, [f"dataset.root={tmp_path}"])
    names = Predictor(elsewhere, str(folder / "model_final.pth")).class_names
    assert names == predictor.class_names
    with pytest.raises(DatasetError, match="num_classes=3"):
        cfg = load_config(CONFIG, [*overrides, "model.num_classes=3"])
        Predictor(cfg, str(folder / "model_final.pth"))


@pytest.mark.fault(50)
def test_classes_that_are_category_ids_come_from_the_checkpoint(tmp_path: Path) -> None:
    """As in the published checkpoints: 91 classes for 80 categories."""
    config = str(ROOT / "projects" / "dn_detr" / "configs" / "shapes_demo.py")
    sizes = ["neck.embed_dim=32", "queries.num_queries=9", "decoder.num_layers=1"]
    overrides = ["train.device=cpu", *(f"model.{size}" for size in sizes)]
    model = instantiate(load_config(config, [*overrides, "model.num_classes=4"]).model)
    categories = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}]
    metadata = build_metadata("", categories)
    DNCheckpointer(model, str(tmp_path), metadata=metadata).save("model")
    found = Predictor(load_config(config, overrides), str(tmp_path / "model.pth"))
    assert found.class_names == ["N/A", "cat", "N/A", "dog"]
    assert found.model.num_classes == 4


def test_images_are_prepared_as_in_the_evaluation(trained, predictor: Predictor) -> None:
    """A resized image gives boxes in the pixels of the original; BGR models get BGR."""
    overrides, folder = trained
    cfg = load_config(CONFIG, overrides)
    cfg.dataloader.test.mapper.image_format = "BGR"
    swapped = Predictor(cfg, str(folder / "model_final.pth"))
    image = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    expected = predictor(image)
    found = swapped(np.ascontiguousarray(image[:, :, ::-1]))
    assert found.image_size == (24, 40)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)


def test_the_best_weights_of_the_training_are_the_default(trained, tmp_path: Path) -> None:
    overrides, folder = trained
    cfg = load_config(CONFIG, overrides)
    assert find_weights(cfg, "mine.pth") == "mine.pth"
    assert find_weights(cfg, None) == str(folder / "model_best.pth")
    with pytest.raises(CheckpointError, match="--weights FILE"):
        find_weights(load_config(CONFIG, [f"train.output_dir={tmp_path}"]), None)


def test_images_are_found_by_name_and_in_folders(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    images = find_images([str(tmp_path / "b.PNG"), str(tmp_path)])
    assert [path.name for path in images] == ["b.PNG", "a.jpg", "b.PNG"]
    with pytest.raises(ValueError, match="no image or folder"):
        find_images([str(tmp_path / "c.png")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="a.jpg cannot be read"):
        read_rgb(tmp_path / "a.jpg")


def test_pictures_of_one_name_do_not_replace_each_other(
    predictor: Predictor, tmp_path: Path
) -> None:
    images = [tmp_path / "a.png", tmp_path / "a.jpg", tmp_path / "gray.png"]
    for path, mode in zip(images, ("RGBA", "RGB", "L")):
        Image.new(mode, (50, 30)).save(path)
    written = draw_images(predictor, images, tmp_path / "out", threshold=0.0)
    assert [path.name for path in written] == ["a.png", "a_2.png", "gray.png"]
    assert all(path.is_file() for path in written)


def test_one_broken_image_of_several_is_skipped(predictor: Predictor, tmp_path: Path) -> None:
    images = [tmp_path / "broken.jpg", tmp_path / "good.png"]
    images[0].write_text("no image")
    Image.new("RGB", (50, 30)).save(images[1])
    written = draw_images(predictor, images, tmp_path / "out", threshold=0.0)
    assert [path.name for path in written] == ["good.png"]
    with pytest.raises(ValueError, match="broken.jpg cannot be read"):
        draw_images(predictor, images[:1], tmp_path / "out", threshold=0.0)


def test_validation_images_beside_the_ground_truth(
    trained, predictor: Predictor, tmp_path: Path
) -> None:
    overrides, _ = trained
    cfg = load_config(CONFIG, overrides)
    sheet = draw_validation(cfg, predictor, tmp_path, num_images=3)
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert min(Image.open(sheet).size) > 400
    first = Path(instantiate(_with_classes(cfg)).pop(0)["file_name"]).name
    every = draw_validation(cfg, predictor, tmp_path / "all", num_images=100)
    assert every.is_file() and (tmp_path / "all" / first).is_file()


def _with_classes(cfg):
    cfg = cfg.copy()
    cfg.model.num_classes = 5
    return cfg.dataloader.test.dataset


def tool(name: str, *options: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / name), "--config-file", CONFIG, *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_demo_tool(trained, tmp_path: Path) -> None:
    _, folder = trained
    images, weights = str(folder / "shapes" / "val"), str(folder / "model_best.pth")
    options = ["--output", "out", "--threshold", "0.1", images]
    done = tool("demo.py", *options, "--weights", weights, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 5
    done = tool("demo.py", *options, "--weights", "none.pth", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "none.pth" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("threshold", ["50", "-0.1", "nan", "high"])
@pytest.mark.parametrize("name, rest", [("demo.py", ["image.png"]), ("visualize.py", [])])
def test_a_threshold_that_is_no_score_is_refused(name, rest, threshold, monkeypatch, capsys):
    options = ["--config-file", CONFIG, "--output", "out", "--threshold", threshold, *rest]
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit) as info:
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    assert info.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --threshold: {threshold} is not a number from 0 to 1" in message


def test_visualize_tool_makes_data_that_are_not_there(trained, tmp_path: Path) -> None:
    _, folder = trained
    options = ["--weights", str(folder / "model_best.pth"), "--num-images", "2", "--output", "out"]
    done = tool("visualize.py", *options, f"dataset.root={tmp_path}/shapes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "predictions.png" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 3
