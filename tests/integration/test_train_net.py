"""tools/train_net.py end to end, on a stand-in detector that trains in milliseconds.

Most runs are in this process; those with two processes, and the script itself, are started: the
script as seldom as can be, since it starts cold.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine import default_argument_parser

from dn_detr.engine.config import load_config
from dn_detr.engine.launch import guarded_main, run
from dn_detr.engine.main import main
from tests.processes import finish, start_ranks

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tools" / "train_net.py")
CONFIG = str(ROOT / "tests" / "engine" / "tiny_config.py")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return f"dataset.root={tmp_path_factory.mktemp('shapes')}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes):
    """(folder, results) of one training with EMA: 6 iterations, evaluated after 3 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder, shapes, "train.ema.enabled=True")


def train(folder, *overrides, flags=()):
    return main(arguments(folder, *overrides, flags=flags))


def arguments(folder, *overrides, flags=()):
    options = ["--config-file", CONFIG, *flags, f"train.output_dir={folder}", *overrides]
    return default_argument_parser().parse_args(options)


def refused(folder, *overrides, flags=()):
    """The message that a run ends with; asserts that it is one message and status 1."""
    with pytest.raises(SystemExit) as info:
        guarded_main(arguments(folder, *overrides, flags=flags))
    message = info.value.code
    assert isinstance(message, str) and message.startswith("error: ")  # so the status is 1
    return message


def script(*options, cwd):
    """Runs tools/train_net.py itself."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, SCRIPT, *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def train_in_two(folder, *overrides, flags=(), cwd):
    """`train` in two processes on the CPU, which have to end well."""
    ranks = start_ranks(2, main, arguments(folder, *overrides, flags=flags), folder=cwd)
    assert [finish(rank) for rank in ranks] == [0, 0], (cwd / "stderr0").read_text()


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def predictions(folder):
    return json.loads((folder / "inference" / "coco_instances_results.json").read_text())


def same(first, second):
    """Equal results, NaN (no object of a size) included."""
    assert first.keys() == second.keys()
    for task in first:
        assert first[task] == pytest.approx(second[task], nan_ok=True, abs=1e-9)
    return True


def test_training_leaves_checkpoints_metrics_and_results(trained, shapes):
    folder, results = trained
    assert {"AP", "AP50", "AP-circle"} <= set(results["bbox"])
    assert set(results["bbox_ema"]) == set(results["bbox"])
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "last_checkpoint"} <= names
    assert {"model_0000002.pth", "model_0000005.pth", "model_final.pth", "model_best.pth"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (folder / "inference_ema" / "coco_instances_results.json").is_file()
    rows = {row["iteration"]: row for row in metrics_of(folder)}
    assert {"total_loss", "loss_ce", "lr", "grad_norm", "bbox/AP", "bbox_ema/AP"} <= set(rows[2])
    assert [row for row in rows if "total_loss" in rows[row]] == list(range(6))
    log = (folder / "log.txt").read_text()
    assert "eta: " in log and "copypaste: AP,AP50,AP75,APs,APm,APl" in log
    assert "Training from scratch" in log


def test_checkpoint_says_what_it_is(trained):
    stored = load(trained[0] / "model_final.pth")
    assert {"model", "trainer", "ema", "metadata", "iteration"} <= set(stored)
    assert stored["ema"]["updates"] == 6
    names = [category["name"] for category in stored["metadata"]["categories"]]
    assert names == ["circle", "square", "triangle", "star", "ring"]
    assert "TinyDetector" in stored["metadata"]["config"]


@pytest.mark.fault(14)
def test_eval_only_equals_the_final_evaluation(trained, shapes, tmp_path):
    folder, results = trained
    weights = f"train.init_checkpoint={folder}/model_final.pth"
    again = train(tmp_path, shapes, weights, "train.ema.enabled=True", flags=["--eval-only"])
    assert same(again, results)
    assert predictions(tmp_path) == predictions(folder)
    raw = train(tmp_path / "raw", shapes, weights, flags=["--eval-only"])
    assert same(raw, {"bbox": results["bbox"]})
    saved = default_argument_parser().parse_args(
        ["--config-file", f"{folder}/config.yaml", "--eval-only", weights]
        + [f"train.output_dir={tmp_path}/saved"]
    )
    assert same(main(saved), results)  # the saved config has EMA switched on


def test_an_evaluation_leaves_the_config_of_the_training_alone(trained, shapes):
    folder, _ = trained
    before = (folder / "config.yaml").read_text()
    weights = f"train.init_checkpoint={folder}/model_final.pth"
    train(folder, shapes, weights, "train.seed=7", flags=["--eval-only"])
    assert (folder / "config.yaml").read_text() == before


def test_resume_goes_on_where_training_stopped(trained, shapes, tmp_path):
    train(tmp_path, shapes, "train.ema.enabled=True", "train.max_iter=3")
    assert load(tmp_path / "model_final.pth")["iteration"] == 2
    train(tmp_path, shapes, "train.ema.enabled=True", flags=["--resume"])
    final, straight = load(tmp_path / "model_final.pth"), load(trained[0] / "model_final.pth")
    assert final["iteration"] == straight["iteration"] == 5
    assert final["trainer"]["iteration"] == 5
    assert final["ema"]["updates"] == 6
    steps = [s["step"] for s in final["trainer"]["optimizer"]["state"].values()]
    assert {int(step) for step in steps} == {6}
    iterations = [row["iteration"] for row in metrics_of(tmp_path) if "total_loss" in row]
    assert iterations == list(range(6))
    assert "Resuming after 3 of 6 iterations" in (tmp_path / "log.txt").read_text()


def test_resume_of_a_finished_training_evaluates(trained, shapes):
    folder, results = trained
    before = len(metrics_of(folder))
    again = train(folder, shapes, "train.ema.enabled=True", flags=["--resume"])
    assert same(again, results)
    assert len(metrics_of(folder)) == before
    assert "Nothing is left to train" in (folder / "log.txt").read_text()


def test_averaged_weights_that_no_step_made_are_not_evaluated(shapes, tmp_path):
    train(tmp_path, shapes, "train.max_iter=1")
    options = [shapes, "train.max_iter=1", "train.ema.enabled=True"]
    assert set(train(tmp_path, *options, flags=["--resume"])) == {"bbox"}


def test_resume_of_another_model_is_refused(shapes, tmp_path):
    train(tmp_path, shapes, "train.max_iter=1")
    before = (tmp_path / "model_final.pth").read_bytes()
    options = [shapes, "train.max_iter=2", "model.width=16"]
    message = refused(tmp_path, *options, flags=["--resume"])
    assert "model_final.pth does not fit the model" in message and "of another shape: " in message
    assert (tmp_path / "model_final.pth").read_bytes() == before


def test_resume_without_a_checkpoint_that_is_whole_is_refused(shapes, tmp_path):
    (tmp_path / "model_0000001.pth").touch()
    message = refused(tmp_path, shapes, flags=["--resume"])
    assert "last_checkpoint: it is missing" in message
    assert "model_0000001.pth: it is empty (0 bytes)" in message
    assert "train.overwrite=True instead of --resume" in message


def test_resume_with_nothing_to_resume_starts_and_says_so(trained, shapes, tmp_path):
    weights = trained[0] / "model_final.pth"
    options = [shapes, "train.max_iter=1", f"train.init_checkpoint={weights}"]
    train(tmp_path, *options, flags=["--resume"])
    log = (tmp_path / "log.txt").read_text()
    assert f"Nothing to resume in {tmp_path}: starting from {weights}" in log


@pytest.mark.fault(13)
def test_folder_with_checkpoints_is_refused_or_replaced(shapes, tmp_path):
    train(tmp_path, shapes, "train.max_iter=1")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "inference_ema").mkdir()
    (tmp_path / "inference_ema" / "coco_instances_results.json").write_text("[]")
    message = refused(tmp_path, shapes, "train.max_iter=1")
    for part in ("already holds checkpoints", "--resume", "train.overwrite=True"):
        assert part in message
    own = f"train.init_checkpoint={tmp_path}/model_final.pth"
    assert "would remove it" in refused(tmp_path, shapes, "train.overwrite=True", own)
    train(tmp_path, shapes, "train.max_iter=2", "train.overwrite=True")
    assert [row["iteration"] for row in metrics_of(tmp_path) if "total_loss" in row] == [0, 1]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "inference_ema" / "coco_instances_results.json").exists()


def contents(folder):
    """The bytes of every file but the log, which a refused run may go on with."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"]
    return {path: path.read_bytes() for path in files}


def wrong(row, *overrides, part, flags=("--resume",)):
    return pytest.param(
        overrides, flags, part, marks=pytest.mark.fault(row), id=" ".join(overrides)
    )


@pytest.mark.parametrize(
    "overrides, flags, part",
    [
        wrong(1, "train.max_iters=5", part="unknown key train.max_iters; did you mean train.max_i"),
        wrong(2, "optimizer.Lr=1", part="unknown key optimizer.Lr; did you mean optimizer.lr?"),
        wrong(3, "train.note=x", part="A new key is written +train.note=..."),
        wrong(4, "train.max_iter=abc", part="train.max_iter expects an integer, got str."),
        wrong(5, "TRAIN.MAX_ITER", "5", part="use train.max_iter=5 instead of TRAIN.MAX_ITER 5"),
        wrong(8, "train.max_iter=0", "optimizer.lr=-1", part="\n  optimizer.lr=-1: expected a fin"),
        wrong(11, "train.device=cuda:99", part="train.device=c"),
        wrong(13, "train.max_iter=5", part="already holds checkpoints", flags=()),
        wrong(16, "train.seed=1", part="train.init_checkpoint=", flags=("--eval-only",)),
        wrong(50, "model.num_classes=7", part="has 5 categories with ids up to 5: use model.num"),
        wrong(51, "dataset.train.json=/no/x.json", part="/no/x.json does not exist; / holds no no"),
    ],
)
def test_what_is_refused_harms_nothing(trained, shapes, overrides, flags, part):
    folder, _ = trained
    before = contents(folder)
    assert part in refused(folder, shapes, *overrides, flags=flags)
    assert contents(folder) == before


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    "mistake",
    [
        "train.max_iter=0",
        "dataset.val.json=none.json",
        "train.init_checkpoint=none.pth",
        "model.num_classes=3",
        "dataset.val.images=tests",
    ],
)
def test_nothing_is_overwritten_by_a_training_that_is_refused(shapes, tmp_path, mistake):
    train(tmp_path, shapes, "train.max_iter=1")
    before = contents(tmp_path)
    refused(tmp_path, shapes, "train.overwrite=True", "train.seed=7", mistake)
    assert contents(tmp_path) == before


@pytest.mark.fault(16)
def test_evaluation_without_a_checkpoint_is_refused(shapes, tmp_path):
    message = refused(tmp_path, shapes, flags=["--eval-only"])
    assert "no checkpoint is given: train.init_checkpoint=FILE" in message
    zoo = "train.init_checkpoint=detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    assert "holds a backbone only" in refused(tmp_path, shapes, zoo, flags=["--eval-only"])
    none = f"train.init_checkpoint={tmp_path}/none.pth"
    assert "none.pth does not exist" in refused(tmp_path, shapes, none, flags=["--eval-only"])


def test_weights_that_cannot_be_fetched(shapes, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("iopath.common.file_io.download", no_network)
    message = refused(
        tmp_path / "out", shapes, "train.init_checkpoint=detectron2://ImageNetPretrained/x/R-7.pkl"
    )
    url = "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/x/R-7.pkl"
    assert f"cannot fetch the weights R-7.pkl from {url} (no route to host)" in message
    cached = tmp_path / "cache" / "detectron2" / "ImageNetPretrained" / "x" / "R-7.pkl"
    assert f"put it at {cached}" in message
    assert "train.init_checkpoint=FILE" in message and "train from scratch" in message
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(b"not weights")
    again = refused(
        tmp_path / "out", shapes, "train.init_checkpoint=detectron2://ImageNetPretrained/x/R-7.pkl"
    )
    assert f"Checkpoint {cached} " in again  # the file put there is the one that is read


@pytest.mark.fault(12)
def test_output_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Said before data are read or a model is built."""
    monkeypatch.setattr("dn_detr.engine.main.resolve_config", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "out", tmp_path / "file", "/proc/x"):
        message = refused(folder)
        assert f"train.output_dir={folder} cannot be written: " in message
        assert "train.output_dir=FOLDER" in message
    assert "train.output_dir is not given" in refused("null")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.fault(3)
@pytest.mark.fault(10)
def test_a_new_key_is_saved_and_amp_runs_on_the_cpu(shapes, tmp_path):
    options = [shapes, "+train.note=x", "train.amp.enabled=True", "train.max_iter=1"]
    train(tmp_path, *options)
    assert load_config(str(tmp_path / "config.yaml")).train.note == "x"
    assert all(v.isfinite().all() for v in load(tmp_path / "model_final.pth")["model"].values())
    message = refused(tmp_path / "half", *options, "train.amp.dtype=float16", "train.device=cpu")
    assert "train.amp.dtype=float16 needs a GPU: train.amp.dtype=bfloat16" in message


@pytest.mark.fault(64)
def test_predictions_of_a_part_of_the_images_have_no_ap(trained, shapes, tmp_path):
    folder, _ = trained
    weights = f"train.init_checkpoint={folder}/model_final.pth"
    half = "dataloader.test.sampler={_target_: detectron2.data.samplers.InferenceSampler, size: 3}"
    message = refused(tmp_path, shapes, weights, half, flags=["--eval-only"])
    assert "there is no AP" in message and "2 images (4, 5): no prediction." in message
    assert "The test loader has to give every image" in message
    assert not (tmp_path / "inference").exists()


@pytest.mark.fault(6)
def test_the_script_without_a_config(tmp_path):
    done = script(cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    expected = "error: no config given: --config-file projects/dn_detr/configs/NAME.py"
    assert done.stderr.strip().splitlines()[-1] == expected
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_error_of_ours_is_a_message_and_a_bug_is_a_traceback(shapes, tmp_path):
    assert "train.max_iter?" in refused(tmp_path, shapes, "train.max_iters=1")
    missing = refused(tmp_path, shapes, f"dataset.val.json={tmp_path}/none.json")
    assert "none.json" in missing
    with pytest.raises(TypeError):  # TinyDetector has no such argument
        guarded_main(arguments(tmp_path, shapes, "+model.depth=3"))


@pytest.mark.parametrize(
    "options, part",
    [
        (["--num-machines", "2", "--machine-rank", "2"], "--machine-rank 2 is not in 0..1"),
        (["--num-machines", "2"], "--dist-url tcp://HOST:PORT"),
        pytest.param(
            ["--num-gpus", "2", "dataloader.train.total_batch_size=3"],
            "dataloader.train.total_batch_size=3 cannot be shared by 2 processes: take 2 or 4",
            marks=pytest.mark.fault(9),
        ),
        pytest.param(
            ["--num-gpus", "2", "train.max_iter=0"],
            "train.max_iter=0: expected an integer of at least 1",
            marks=pytest.mark.fault(8),
        ),
    ],
)
def test_command_line_is_refused_before_processes_start(options, part):
    with pytest.raises(SystemExit, match=part):
        run(["--config-file", CONFIG, *options])


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(SystemExit, match="not torchrun"):
        run(["--config-file", CONFIG])


@pytest.mark.fault(65)
def test_two_processes_evaluate_like_one(trained, shapes, tmp_path):
    folder, results = trained
    weights = f"train.init_checkpoint={folder}/model_final.pth"
    train_in_two(tmp_path, shapes, weights, flags=["--eval-only"], cwd=tmp_path)
    assert predictions(tmp_path) == predictions(folder)  # 5 images: 3 and 2
    printed = (tmp_path / "log.txt").read_text()
    assert f"copypaste: {results['bbox']['AP']:.4f}," in printed


def test_two_processes_train_like_one(shapes, tmp_path):
    # Without augmentation the processes together see the very images that one sees.
    options = [shapes, "train.accumulate=2", "train.max_iter=3", "train.ema.enabled=True"]
    options += ["dataloader.train.mapper.augmentations=[]", "optimizer.eps=1e-3"]
    elsewhere = "model._target_=tests.engine.tiny.ElsewhereInProcessOne"
    train_in_two("two", *options, elsewhere, cwd=tmp_path)
    assert (tmp_path / "two" / "log.txt.rank1").is_file()
    train(tmp_path / "one", *options)
    two, one = (load(tmp_path / name / "model_final.pth") for name in ("two", "one"))
    assert two["iteration"] == one["iteration"] == 2
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two["ema"]["model"][name], one["ema"]["model"][name])
    losses = [
        [row["total_loss"] for row in metrics_of(tmp_path / name) if "total_loss" in row]
        for name in ("two", "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_nan_in_one_process_stops_both_with_one_message(shapes, tmp_path):
    done = script(
        *("--config-file", CONFIG, "--num-gpus", "2", shapes, f"train.output_dir={tmp_path}"),
        "model._target_=tests.engine.tiny.BreaksInProcessOne",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: iteration 0: process 1: loss_bbox=nan, with images ")
    dump = tmp_path / "nonfinite_iter_0000000_process_1.pth"
    assert f"the batch is written to {dump}. Training stops before the step" in last
    assert last.endswith("No checkpoint was saved yet.")
    assert len(load(dump)["batch"]) == 2 and len(list(tmp_path.glob("nonfinite*"))) == 1
    dump.unlink()
    assert not list(tmp_path.glob("*.pth"))


def test_image_that_cannot_be_read_is_named(tmp_path):
    shapes = f"dataset.root={tmp_path}/shapes"
    train(tmp_path / "out", shapes, "train.max_iter=1")
    image = next((tmp_path / "shapes" / "val").iterdir())
    image.write_bytes(image.read_bytes()[:40])
    weights = f"train.init_checkpoint={tmp_path}/out/model_final.pth"
    for workers in (0, 1):
        options = [shapes, weights, f"dataloader.test.num_workers={workers}"]
        message = refused(tmp_path / "eval", *options, flags=["--eval-only"])
        assert str(image) in message and "Traceback" not in message


def test_help_shows_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--help"])
    with pytest.raises(SystemExit) as info:
        runpy.run_path(SCRIPT, run_name="__main__")
    assert not info.value.code
    shown = capsys.readouterr().out
    for part in ("--num-gpus 8", "--dist-url tcp://FIRST_MACHINE:PORT", "--eval-only", "--resume"):
        assert part in shown
