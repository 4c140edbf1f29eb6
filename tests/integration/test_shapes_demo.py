"""The demos' configs through the whole of training and evaluation, scaled down to seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine import default_argument_parser

from dn_detr.checkpoint.reading import CheckpointError
from dn_detr.engine.main import main

ROOT = Path(__file__).parents[2]
CONFIG, DEFORMABLE = (
    str(ROOT / "projects" / family / "configs" / "shapes_demo.py")
    for family in ("dn_detr", "dn_deformable_detr")
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    generate = [f"dataset.generate.{s}" for s in ("size=64", "num_train=8", "num_val=3")]
    return [f"dataset.root={root}", *generate]


def options(folder, data, *overrides, flags=(), config=CONFIG):
    small = ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    small += ["dataloader.train.total_batch_size=4", "train.device=cpu", "train.log_period=1"]
    given = ["--config-file", config, *flags, f"train.output_dir={folder}"]
    return [*given, *data, *small, *overrides]


def run(folder, data, *overrides, flags=(), config=CONFIG):
    given = options(folder, data, *overrides, flags=flags, config=config)
    return main(default_argument_parser().parse_args(given))


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [row for row in rows if "total_loss" in row]


@pytest.mark.parametrize("config", [CONFIG, DEFORMABLE], ids=["dense", "deformable"])
def test_train_resume_and_evaluate(config, data, tmp_path):
    def run_it(folder, *overrides, flags=()):
        return run(folder, data, *overrides, flags=flags, config=config)

    run_it(tmp_path, "train.max_iter=2", "train.amp.enabled=True", "train.accumulate=2")
    results = run_it(tmp_path, "train.max_iter=3", "train.eval_period=2", flags=["--resume"])
    rows = losses(tmp_path)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert {"loss_ce", "loss_bbox_0", "loss_giou", "dn_loss_ce", "dn_loss_giou_0"} <= set(rows[0])
    assert all(0 < row["total_loss"] < 100 for row in rows)
    assert {"AP", "AP50", "AP-circle", "AP-ring"} <= set(results["bbox"])
    assert set(results) == {"bbox", "bbox_ema"}
    weights = f"train.init_checkpoint={tmp_path}/model_final.pth"
    again = run_it(tmp_path / "eval", weights, flags=["--eval-only"])
    for task in results:
        assert again[task] == pytest.approx(results[task], nan_ok=True)


def test_resume_with_other_classes_is_refused(data, tmp_path):
    run(tmp_path, data, "train.max_iter=1")
    root, others = Path(data[0].partition("=")[2]), []
    for split in ("train", "val"):
        renamed = (root / f"{split}.json").read_text().replace('"ring"', '"torus"')
        (tmp_path / f"{split}.json").write_text(renamed)
        others += [f"dataset.{split}.json={tmp_path}/{split}.json"]
        others += [f"dataset.{split}.images={root}/{split}"]
    with pytest.raises(CheckpointError, match="in the checkpoint: ring; only in the data: torus"):
        run(tmp_path, data, "train.max_iter=2", *others, flags=["--resume"])


def test_denoising_can_be_switched_off(data, tmp_path):
    run(tmp_path, data, "train.max_iter=1", "model.denoising=null")
    (row,) = losses(tmp_path)
    assert "loss_ce" in row and not any(name.startswith("dn_") for name in row)


def test_training_is_the_same_with_the_same_seed(data, tmp_path):
    for name in ("a", "b"):
        run(tmp_path / name, data, "train.max_iter=2")
    first, second = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"] for name in "ab"
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_two_processes_evaluate_the_model_that_they_save(data, tmp_path):
    """Each process has batch statistics of its own; what counts is what is in the checkpoint."""
    command = [sys.executable, str(ROOT / "tools" / "train_net.py")]
    done = subprocess.run(
        [*command, *options(tmp_path, data, "train.max_iter=3", flags=["--num-gpus", "2"])],
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    weights = f"train.init_checkpoint={tmp_path}/model_final.pth"
    run(tmp_path / "eval", data, weights, flags=["--eval-only"])
    for name in ("inference", "inference_ema"):
        pair = (
            json.loads((folder / name / "coco_instances_results.json").read_text())
            for folder in (tmp_path, tmp_path / "eval")
        )
        for trained, loaded in zip(*pair, strict=True):
            assert trained["image_id"] == loaded["image_id"]
            assert trained["score"] == pytest.approx(loaded["score"], rel=1e-4)
            assert trained["bbox"] == pytest.approx(loaded["bbox"], abs=1e-2)
