"""Faults of checkpoints, as tools/train_net.py meets them."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from dn_detr.checkpoint import writing
from dn_detr.checkpoint.export import export_weights
from dn_detr.checkpoint.reading import read_checkpoint
from dn_detr.engine.launch import guarded_main
from tests.integration import test_train_net
from tests.integration.test_train_net import predictions, same
from tests.processes import finish, start_ranks

EVERY_STEP = ("train.checkpointer.period=1", "train.eval_period=0", "train.ema.enabled=True")
RESUME = ("--resume",)
EVALUATE = ("--eval-only",)


def train(folder, *overrides, flags=()):
    return test_train_net.train(_quoted(folder), *overrides, flags=flags)


def refused(folder, *overrides, flags=()):
    return test_train_net.refused(_quoted(folder), *overrides, flags=flags)


def _quoted(folder):
    """For an override: names that are not plain need quotes."""
    return f'"{folder}"'


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return f"dataset.root={tmp_path_factory.mktemp('shapes')}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory, shapes):
    """model_final.pth of a training of two iterations."""
    folder = tmp_path_factory.mktemp("weights")
    train(folder, shapes, "train.max_iter=2", *EVERY_STEP)
    return folder / "model_final.pth"


@pytest.fixture(params=["größe 训练", "link"])
def started(request, tmp_path, shapes):
    """A folder (of an odd name, or a link) with checkpoints of the iterations 1, 2 and 3."""
    folder = tmp_path / request.param
    if request.param == "link":
        (tmp_path / "real").mkdir()
        folder.symlink_to(tmp_path / "real", target_is_directory=True)
    train(folder, shapes, "train.max_iter=4", *EVERY_STEP)
    (folder / "model_final.pth").unlink()
    (folder / "model_best.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Contents of the checkpoints."""
    return {
        p.name: p.read_bytes() for p in folder.iterdir() if "model" in p.name or "last" in p.name
    }


@pytest.mark.fault(20)
@pytest.mark.fault(21)
@pytest.mark.parametrize("fault", ["cut", "empty tag", "no tag", "file is gone", "absolute, CRLF"])
def test_resume_falls_back_and_ends_as_ever(started, shapes, fault):
    last, tag = started / "model_0000003.pth", started / "last_checkpoint"
    if fault == "cut":
        os.truncate(last, 5000)
    elif fault == "empty tag":
        tag.write_text("")
    elif fault == "no tag":
        tag.unlink()
    elif fault == "file is gone":
        last.unlink()
    else:
        tag.write_text(f"{last}\r\n")
    train(started, shapes, "train.max_iter=5", *EVERY_STEP, flags=RESUME)
    log = (started / "log.txt").read_text()
    gone = fault in ("cut", "file is gone")
    assert f"Resuming after {3 if gone else 4} of 5 iterations." in log
    if fault != "absolute, CRLF":
        number = 2 if gone else 3
        whole = f"Resuming from {started}/model_000000{number}.pth, the newest that is whole."
        assert log.count("these cannot be resumed from:") == log.count(whole) == 1
    final = read_checkpoint(started / "model_final.pth")
    assert final["iteration"] == 4 and final["ema"]["updates"] == 5
    assert read_checkpoint(last)["iteration"] == 3 or gone
    assert tag.read_text() == "model_final.pth"


@pytest.mark.fault(22)
def test_resume_without_a_whole_checkpoint_is_refused(started, shapes):
    for path in started.glob("model_*.pth"):
        os.truncate(path, 5000)
    before = files(started)
    message = refused(started, shapes, "train.max_iter=5", flags=RESUME)
    for name in ("model_0000001.pth", "model_0000002.pth", "model_0000003.pth"):
        assert f"\n  {name}: it is truncated or damaged (5000 bytes; " in message
    assert f"In {started}, these cannot be resumed from:" in message
    assert message.endswith(
        "start afresh, which removes these: train.overwrite=True instead of --resume."
    )
    assert files(started) == before
    train(started, shapes, "train.max_iter=1", "train.overwrite=True")
    assert set(files(started)) == {"model_final.pth", "model_best.pth", "last_checkpoint"}


def full_disk(monkeypatch, when, error=errno.ENOSPC):
    """Makes writing fail halfway for the checkpoints whose name `when` accepts."""

    def save(data, file):
        if when(Path(file.name).name):
            file.write(b"half a file")
            raise OSError(error, os.strerror(error))
        torch_save(data, file)

    torch_save = torch.save
    monkeypatch.setattr(writing.torch, "save", save)


@pytest.mark.fault(24)
@pytest.mark.fault(26)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_training_goes_on_while_nothing_can_be_written(tmp_path, shapes, monkeypatch, error):
    with monkeypatch.context() as context:
        full_disk(context, lambda name: "_000000" in name and "_0000000" not in name, error)
        train(tmp_path, shapes, "train.max_iter=4", *EVERY_STEP)
    log = (tmp_path / "log.txt").read_text()
    for number in (1, 2, 3):
        path = f"{tmp_path}/model_000000{number}.pth"
        assert log.count(f"{path} could not be saved: {os.strerror(error)}. The checkpoint") == 1
    assert (
        "before it, model_0000000.pth, is whole. The next try comes after 3 of 4 iterations." in log
    )
    names = {"last_checkpoint", "model_0000000.pth", "model_best.pth", "model_final.pth"}
    assert set(files(tmp_path)) == names
    assert not list(tmp_path.glob(".*.tmp"))
    undisturbed = tmp_path / "undisturbed"
    train(undisturbed, shapes, "train.max_iter=4", *EVERY_STEP)
    final, expected = (read_checkpoint(f / "model_final.pth") for f in (tmp_path, undisturbed))
    assert all(value.equal(expected["model"][name]) for name, value in final["model"].items())


@pytest.mark.fault(24)
def test_a_final_checkpoint_that_cannot_be_written_is_an_error(tmp_path, shapes, monkeypatch):
    with monkeypatch.context() as context:
        full_disk(context, lambda name: "final" in name)
        message = refused(tmp_path, shapes, "train.max_iter=3", *EVERY_STEP)
    assert f"{tmp_path}/model_final.pth could not be saved: No space left on device." in message
    assert "The checkpoint before it, model_0000002.pth, is whole. Make room" in message
    assert "copypaste: AP" in (tmp_path / "log.txt").read_text()  # evaluated all the same
    assert not (tmp_path / "model_final.pth").exists()
    train(tmp_path, shapes, "train.max_iter=4", *EVERY_STEP, flags=RESUME)
    assert read_checkpoint(tmp_path / "model_final.pth")["iteration"] == 3


def _train_while_the_disk_is_full(args) -> None:
    full_disk(pytest.MonkeyPatch(), lambda name: "final" in name or "_0000001" in name)
    guarded_main(args)


def _end_with_the_first(ranks) -> None:
    """As the launcher does."""
    assert finish(ranks[0]) == 1
    ranks[1].kill()
    ranks[1].join()


@pytest.mark.fault(24)
@pytest.mark.fault(22)
def test_two_processes_end_alike(tmp_path, shapes):
    """First with a disk that is full in the end, then with no checkpoint that is whole."""
    out = tmp_path / "out"
    args = test_train_net.arguments(out, shapes, "train.max_iter=2", *EVERY_STEP)
    ranks = start_ranks(2, _train_while_the_disk_is_full, args, folder=tmp_path)
    _end_with_the_first(ranks)
    said = (tmp_path / "stderr0").read_text().splitlines()[-1]
    assert said.startswith(f"error: {out}/model_final.pth could not be saved: No space left")
    assert said.endswith("model_0000000.pth, is whole. Make room there, then --resume.")
    assert set(files(out)) == {"last_checkpoint", "model_0000000.pth", "model_best.pth"}

    for name in ("model_0000000.pth", "model_best.pth"):
        os.truncate(out / name, 5000)
    args = test_train_net.arguments(out, shapes, *EVERY_STEP, flags=RESUME)
    ranks = start_ranks(2, guarded_main, args, folder=tmp_path)
    _end_with_the_first(ranks)
    errors = [(tmp_path / f"stderr{rank}").read_text() for rank in (0, 1)]
    assert "model_0000000.pth: it is truncated or damaged" in errors[0]
    assert "error:" not in errors[1]  # told once


@pytest.mark.fault(27)
def test_number_of_checkpoints_over_three_resumes(tmp_path, shapes):
    options = (shapes, *EVERY_STEP, "train.checkpointer.max_to_keep=2")
    for length, flags in ((3, ()), (5, RESUME), (6, RESUME), (9, RESUME)):
        train(tmp_path, *options, f"train.max_iter={length}", flags=flags)
        numbered = sorted(name for name in files(tmp_path) if "_0" in name)
        assert numbered == [f"model_000000{i}.pth" for i in (length - 2, length - 1)]
        assert {"model_final.pth", "model_best.pth"} <= set(files(tmp_path))


@pytest.mark.fault(28)
def test_best_weights_over_a_resume(tmp_path, shapes):
    train(tmp_path, shapes, "train.max_iter=2", *EVERY_STEP)
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    best["best"]["value"] = 99.0
    torch.save(best, tmp_path / "model_best.pth")
    before = (tmp_path / "model_best.pth").read_bytes()
    train(tmp_path, shapes, "train.max_iter=3", *EVERY_STEP, flags=RESUME)
    assert (tmp_path / "model_best.pth").read_bytes() == before
    assert "the best is 99.000" in (tmp_path / "log.txt").read_text()


@pytest.mark.fault(17)
def test_a_checkpoint_that_is_not_there(tmp_path, shapes, weights):
    for flags in (EVALUATE, ()):
        missing = weights.with_name("model_finale.pth")
        message = refused(tmp_path, shapes, f"train.init_checkpoint={missing}", flags=flags)
        assert f"Checkpoint {missing} does not exist. In {missing.parent} there is: " in message
        assert "model_final.pth" in message
        assert not files(tmp_path)


@pytest.mark.fault(18)
def test_weights_of_another_model(tmp_path, shapes):
    names = [f"layer{i}.conv.weight" for i in range(7)]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "resnet.pth")
    for flags in (EVALUATE, ()):
        other = f"train.init_checkpoint={tmp_path}/resnet.pth"
        message = refused(tmp_path / "out", shapes, other, flags=flags)
        assert f"{tmp_path}/resnet.pth does not fit the model: 0 of 11 entries fit." in message
        assert "missing in the file: 11 (backbone.0.bias, " in message
        assert f"unknown to the model: 7 ({', '.join(names[:5])}, ...)" in message


@pytest.mark.fault(29)
@pytest.mark.fault(30)
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_weights_that_would_run_code(tmp_path, shapes, weights, suffix):
    canary, path = tmp_path / "canary", tmp_path / f"evil{suffix}"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    data = {**read_checkpoint(weights), "evil": Evil()}
    torch.save(data, path) if suffix == ".pth" else path.write_bytes(pickle.dumps(data))
    for flags in (EVALUATE, ()):
        message = refused(tmp_path / "out", shapes, f"train.init_checkpoint={path}", flags=flags)
        assert f"Checkpoint {path} is refused: it refers to " in message
        assert "Nothing was run." in message
    if suffix == ".pth":
        (tmp_path / "out" / "model_0000003.pth").write_bytes(path.read_bytes())
        (tmp_path / "out" / "last_checkpoint").write_text("model_0000003.pth")
        message = refused(tmp_path / "out", shapes, flags=RESUME)
        assert "model_0000003.pth: it refers to posix.mkdir, which could run code" in message
    assert not canary.exists()


@pytest.mark.fault(30)
def test_a_config_that_nobody_named_is_not_run(started, shapes, tmp_path):
    """A config is code. The one beside, or in, a checkpoint is text until it is named."""
    evil = f"model:\n  _target_: os.mkdir\n  path: {tmp_path}/canary\n"
    path = started / "model_0000003.pth"
    data = read_checkpoint(path)
    data["metadata"]["config"] = evil
    torch.save(data, path)
    (started / "config.yaml").write_text(evil)
    export_weights(str(path), str(tmp_path / "exported.safetensors"))
    init = f"train.init_checkpoint={_quoted(path)}"
    train(tmp_path / "evaluation", shapes, init, flags=EVALUATE)
    train(tmp_path / "tuning", shapes, init, "train.max_iter=1")
    train(started, shapes, "train.max_iter=5", *EVERY_STEP, flags=RESUME)
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault(33)
def test_weights_that_are_not_finite(tmp_path, shapes, weights):
    data = read_checkpoint(weights)
    data["model"]["class_head.weight"][1, 2] = torch.nan
    torch.save(data, tmp_path / "nan.pth")
    for flags in (EVALUATE, ()):
        init = f"train.init_checkpoint={tmp_path}/nan.pth"
        message = refused(tmp_path / "out", shapes, init, flags=flags)
        assert "nan.pth: class_head.weight holds numbers that are not finite" in message
        assert "use an earlier checkpoint" in message


@pytest.mark.fault(34)
def test_safetensors_evaluate_as_pth_does(tmp_path, shapes, weights):
    export_weights(str(weights), str(tmp_path / "raw.safetensors"))
    export_weights(str(weights), str(tmp_path / "averaged.safetensors"), averaged=True)
    results, boxes = {}, {}
    for name, path in (("pth", weights), *((p.stem, p) for p in tmp_path.glob("*.safetensors"))):
        options = (shapes, f"train.init_checkpoint={path}", "train.ema.enabled=True")
        results[name] = train(tmp_path / name, *options, flags=EVALUATE)
        boxes[name] = predictions(tmp_path / name)
    assert same({"bbox": results["pth"]["bbox"]}, results["raw"])
    assert same({"bbox": results["pth"]["bbox_ema"]}, results["averaged"])
    assert boxes["pth"] == boxes["raw"]
    averaged = tmp_path / "pth" / "inference_ema" / "coco_instances_results.json"
    assert json.loads(averaged.read_text()) == boxes["averaged"]
    other = [shapes, f"train.init_checkpoint={tmp_path}/raw.safetensors", "train.max_iter=1"]
    train(tmp_path / "tuned", *other)
