"""A training that was stopped and resumed ends bit by bit as one that was not."""

import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.engine import default_argument_parser
from omegaconf import OmegaConf

from dn_detr.data.shapes import generate_shapes
from dn_detr.engine.launch import guarded_main

from tests.equal import assert_equal
from tests.processes import finish, start, start_ranks

CONFIG = str(Path(__file__).parents[1] / "engine" / "resume_config.py")
STEPS = 7
TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Ten images to train on, wide and high ones."""
    folder = tmp_path_factory.mktemp("shapes")
    generate_shapes(folder, size=32, num_train=10, num_val=5, seed=0)
    content = json.loads((folder / "train.json").read_text())
    for entry in content["images"][::2]:
        path = folder / "train" / entry["file_name"]
        image = Image.open(path)
        image.crop((0, 0, 32, 20)).save(path)
        entry["height"] = 20
    (folder / "train.json").write_text(json.dumps(content))
    return f"dataset.root={folder}"


def run(options):
    guarded_main(default_argument_parser().parse_args(["--config-file", CONFIG, *options]))


def train(output, *overrides, folder, steps=f"train.max_iter={STEPS}", flags=(), processes=1):
    """Trains in processes of its own, and gives their exit status."""
    options = [*flags, f"train.output_dir={output}", steps, *overrides]
    if processes == 1:
        return finish(start(run, options, folder=folder))
    status = {finish(rank) for rank in start_ranks(processes, run, options, folder=folder)}
    assert len(status) == 1, status
    return status.pop()


def stop_after(iteration, with_signal="SIGTERM"):
    """Overrides that have the (last) process send itself a signal within an iteration."""
    return [
        "model._target_=tests.engine.tiny.StopsItself",
        f"+model.at={iteration}",
        f"+model.number={getattr(signal, with_signal).value}",
    ]


def load(path):
    return torch.load(path, weights_only=True)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_same_training(straight, resumed):
    first, second = (load(folder / "model_final.pth") for folder in (straight, resumed))
    for stored in (first, second):
        del stored["metadata"]  # names the output folder
        for name in TIMES:
            stored["trainer"]["metrics"].pop(name, None)
    assert_equal(first, second)
    # The text, since NaN (no object of a size) equals nothing.
    assert repr(metrics(straight)) == repr(metrics(resumed))


VARIANTS = {
    "plain": [],
    "workers": ["dataloader.train.num_workers=2", "dataloader.test.num_workers=1"],
    "grouping": ["dataloader.train.aspect_ratio_grouping=True"],
    "accumulation": ["train.accumulate=2", "dataloader.train.num_workers=1"],
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, shapes):
    """(processes, variant) -> the folder of a training that was not stopped."""
    found = {}

    def get(processes, variant):
        if (processes, variant) not in found:
            folder = tmp_path_factory.mktemp("straight")
            status = train(
                folder / "out", shapes, *VARIANTS[variant], folder=folder, processes=processes
            )
            assert status == 0, (folder / "stderr").read_text()
            found[processes, variant] = folder / "out"
        return found[processes, variant]

    return get


@pytest.mark.fault(62)
@pytest.mark.fault(56)
@pytest.mark.parametrize(
    "processes, variant, stop",
    [(1, "plain", stop) for stop in range(STEPS - 1)]
    + [(1, "workers", 3), (1, "grouping", 2), (1, "grouping", 4), (1, "accumulation", 2)]
    + [(2, "plain", 1), (2, "workers", 4), (2, "grouping", 3), (2, "accumulation", 3)],
)
def test_stopped_and_resumed(straight, shapes, tmp_path, processes, variant, stop):
    out, options = tmp_path / "out", [shapes, *VARIANTS[variant]]
    stopping = stop_after(stop)
    assert train(out, *options, *stopping, folder=tmp_path, processes=processes) == 143
    assert (out / "last_checkpoint").read_text() == f"model_{stop:07d}.pth"
    assert "SIGTERM: the training stops. The last checkpoint is" in (out / "log.txt").read_text()
    flags = ["--resume"]
    assert train(out, *options, flags=flags, folder=tmp_path, processes=processes) == 0
    assert_same_training(straight(processes, variant), out)


@pytest.mark.fault(62)
@pytest.mark.parametrize("kill", [4, 5])
def test_killed_and_resumed(straight, shapes, tmp_path, kill):
    """Steps behind the last checkpoint are made again, and are the same."""
    out = tmp_path / "out"
    status = train(out, shapes, *stop_after(kill, "SIGKILL"), folder=tmp_path)
    assert status == -signal.SIGKILL
    assert (out / "last_checkpoint").read_text() == "model_0000003.pth"
    assert train(out, shapes, flags=["--resume"], folder=tmp_path) == 0
    assert_same_training(straight(1, "plain"), out)
    replaced = (out / "metrics_replaced.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in replaced] == list(range(3, kill))


@pytest.mark.fault(62)
def test_killed_between_checkpoint_and_evaluation(straight, shapes, tmp_path):
    """What was due at the iteration of the checkpoint is made up for."""
    out = tmp_path / "out"
    options = ["dataloader.evaluator._target_=tests.engine.tiny.killing_evaluator"]
    assert train(out, shapes, *options, folder=tmp_path) == -signal.SIGKILL
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
    assert train(out, shapes, flags=["--resume"], folder=tmp_path) == 0
    assert_same_training(straight(1, "plain"), out)


@pytest.mark.fault(56)
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_in_an_evaluation(straight, shapes, tmp_path, processes):
    out = tmp_path / "out"
    options = ["dataloader.evaluator._target_=tests.engine.tiny.stopping_evaluator"]
    assert train(out, shapes, *options, folder=tmp_path, processes=processes) == 128 + 12
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
    assert train(out, shapes, flags=["--resume"], folder=tmp_path, processes=processes) == 0
    assert_same_training(straight(processes, "plain"), out)


@pytest.mark.fault(56)
def test_stopped_in_an_evaluation_that_is_made_up_for(straight, shapes, tmp_path):
    """No step was made, so no checkpoint is written: it would have the number of the next step."""
    out, evaluator = tmp_path / "out", "dataloader.evaluator._target_=tests.engine.tiny."
    status = train(out, shapes, f"{evaluator}killing_evaluator", folder=tmp_path)
    assert status == -signal.SIGKILL
    options = [shapes, f"{evaluator}stopping_evaluator"]
    assert train(out, *options, flags=["--resume"], folder=tmp_path) == 128 + 12
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
    assert train(out, shapes, flags=["--resume"], folder=tmp_path) == 0
    assert_same_training(straight(1, "plain"), out)


@pytest.mark.fault(56)
@pytest.mark.fault(62)
def test_stopped_in_the_last_step(straight, shapes, tmp_path):
    """That one ends as ever, with its checkpoint; what was left is the last evaluation."""
    out = tmp_path / "out"
    assert train(out, shapes, *stop_after(STEPS - 1), folder=tmp_path) == 143
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    assert not (out / f"model_{STEPS - 1:07d}.pth").exists()
    final = (out / "model_final.pth").read_bytes()
    assert train(out, shapes, flags=["--resume"], folder=tmp_path) == 0
    assert_same_training(straight(1, "plain"), out)
    assert (out / "model_final.pth").read_bytes() == final
    assert "bbox/AP" in metrics(out)[-1]


def test_every_evaluation_is_made_once(shapes, tmp_path):
    """Of raw and averaged weights: after two iterations and after four, which are the last."""
    assert train(tmp_path / "out", shapes, steps="train.max_iter=4", folder=tmp_path) == 0
    assert (tmp_path / "out" / "log.txt").read_text().count("Start inference on") == 4


def test_records_of_the_last_iterations_are_written(shapes, tmp_path):
    options = [shapes, "train.log_period=3", "train.eval_period=0"]
    assert train(tmp_path / "out", *options, folder=tmp_path) == 0
    rows = metrics(tmp_path / "out")
    assert [row["iteration"] for row in rows] == [2, 5, 6, 7]
    assert "total_loss" in rows[2] and "bbox/AP" in rows[3]


@pytest.mark.fault(62)
def test_resumed_twice_and_by_other_processes(straight, shapes, tmp_path):
    """The images go on where they were, with other processes, batches and workers, too."""
    out = tmp_path / "out"
    assert train(out, shapes, *stop_after(1), folder=tmp_path, processes=2) == 143
    more = ["dataloader.train.num_workers=1", *stop_after(3)]
    assert train(out, shapes, *more, folder=tmp_path, flags=["--resume"]) == 143
    assert train(out, shapes, folder=tmp_path, flags=["--resume"], processes=2) == 0
    first, second = (
        load(folder / "model_final.pth")["trainer"] for folder in (straight(2, "plain"), out)
    )
    assert first["images_seen"] == second["images_seen"] == 4 * STEPS


@pytest.mark.fault(63)
def test_the_seed_decides(straight, shapes, tmp_path):
    for name, seed in (("same", 42), ("other", 43)):
        assert train(tmp_path / name, shapes, f"train.seed={seed}", folder=tmp_path) == 0
    assert_same_training(straight(1, "plain"), tmp_path / "same")
    same, other = (load(tmp_path / name / "model_final.pth")["model"] for name in ("same", "other"))
    assert not any(torch.equal(same[name], other[name]) for name in same if "weight" in name)


def test_a_random_seed_is_kept_over_a_resume(shapes, tmp_path):
    options = [shapes, "train.seed=-1"]
    assert train(tmp_path / "out", *options, *stop_after(2), folder=tmp_path) == 143
    config = tmp_path / "out" / "config.yaml"
    drawn = OmegaConf.load(config).train.seed
    assert train(tmp_path / "out", *options, flags=["--resume"], folder=tmp_path) == 0
    assert OmegaConf.load(config).train.seed == drawn >= 0


def test_changes_on_resume_are_said_and_count(shapes, tmp_path):
    out = tmp_path / "out"
    assert train(out, shapes, *stop_after(2), folder=tmp_path) == 143
    before = load(out / "model_0000002.pth")["trainer"]["optimizer"]["param_groups"]
    options = [shapes, "train.max_iter=9", "optimizer.lr=0.005", "optimizer.weight_decay=0.01"]
    options += ["lr_multiplier.milestones=[45]"]
    assert train(out, *options, steps="train.seed=42", flags=["--resume"], folder=tmp_path) == 0
    log = (out / "log.txt").read_text()
    assert "goes on with another config than it was stopped with" in log
    for line in (
        "lr_multiplier.milestones.0: 40 -> 45",
        "optimizer.lr: 0.01 -> 0.005",
        "optimizer.weight_decay: 0.0001 -> 0.01",
        f"train.max_iter: {STEPS} -> 9",
        "learning rates follow the new length",
    ):
        assert line in log
    after = load(out / "model_final.pth")["trainer"]["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in before} == {1e-4}
    assert {group["weight_decay"] for group in after} == {0.01}
    rates = {row["iteration"]: row["lr"] for row in metrics(out) if "lr" in row}
    assert rates[2] == 0.001 and rates[3] == 0.0005  # the backbone's
