"""Periodic and best checkpoints, over resumes and failures."""

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine import HookBase, hooks
from detectron2.engine.train_loop import TrainerBase

from dn_detr.checkpoint import writing
from dn_detr.checkpoint.checkpointer import CheckpointError, DNCheckpointer
from dn_detr.checkpoint.folder import find_checkpoint
from dn_detr.checkpoint.reading import read_checkpoint
from dn_detr.engine.hooks import BestCheckpointer, FinalCheckpointer, PeriodicCheckpointer


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """detectron2's setup_logger, called by any other test, stops `caplog` from hearing this."""
    monkeypatch.setattr(logging.getLogger("dn_detr"), "propagate", True)


class Counter(TrainerBase):
    """Trains nothing: the weight is the number of the iteration."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def run_step(self):
        self.model.weight.data.fill_(self.iter)


def train(
    folder, values, start=0, checkpoint_period=100, max_to_keep=None, max_iter=None, extra=()
):
    """Runs len(values) iterations, each evaluated, with these values of the metric.

    From `start` > 0 on, the training is resumed from the folder.
    """
    trainer = Counter(torch.nn.Linear(1, 1))
    checkpointer = DNCheckpointer(trainer.model, str(folder), trainer=trainer)
    remaining = iter(values)
    best = BestCheckpointer(checkpointer, "bbox/AP", period=1)
    trainer.periodic = PeriodicCheckpointer(checkpointer, checkpoint_period, max_to_keep)
    evaluate = hooks.EvalHook(1, lambda: {"bbox": {"AP": next(remaining)}})
    final = FinalCheckpointer(checkpointer)
    trainer.register_hooks([trainer.periodic, evaluate, best, final, *extra])
    if start:
        checkpointer.resume(find_checkpoint(folder), categories=[])
        assert trainer.iter + 1 == start
    trainer.train(start, max_iter or start + len(values))
    return best


def names(folder):
    return sorted(path.name for path in folder.glob(".*.tmp")) + sorted(
        path.name for path in folder.glob("*.pth")
    )


def numbered(*iterations):
    return [f"model_{iteration:07d}.pth" for iteration in iterations]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def weight(folder, name):
    return torch.load(folder / f"{name}.pth", weights_only=True)["model"]["weight"].item()


def test_best_weights_are_kept(tmp_path):
    best = train(tmp_path, [10.0, 30.0, 20.0, 30.0])
    assert (best.best, best.best_iteration) == (30.0, 1)
    assert weight(tmp_path, "model_best") == 1
    stored = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert stored["best"] == {"metric": "bbox/AP", "value": 30.0, "iteration": 1}


def test_last_evaluation_counts(tmp_path):
    train(tmp_path, [10.0, 30.0, 40.0])
    assert weight(tmp_path, "model_best") == weight(tmp_path, "model_final") == 2


@pytest.mark.fault(28)
def test_best_value_survives_resume(tmp_path):
    train(tmp_path, [10.0, 30.0])
    train(tmp_path, [20.0, 25.0], start=2)
    assert weight(tmp_path, "model_best") == 1
    train(tmp_path, [20.0, 31.0], start=4)
    assert weight(tmp_path, "model_best") == 5


def test_new_training_does_not_ask_the_old_file(tmp_path):
    train(tmp_path, [30.0])
    train(tmp_path, [10.0])
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["best"]["value"] == 10.0


def test_training_resumes_from_the_last_not_the_best(tmp_path):
    train(tmp_path, [10.0, 30.0, 20.0], checkpoint_period=1)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    train(tmp_path, [10.0, 40.0], start=3, checkpoint_period=1)
    assert weight(tmp_path, "model_best") == 4
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_weights_saved_as_best_can_be_resumed_from(tmp_path):
    train(tmp_path, [10.0, 30.0])
    for name in ("model_final.pth", "last_checkpoint"):
        (tmp_path / name).unlink()
    stored = read_checkpoint(tmp_path / "model_best.pth")
    assert stored["iteration"] == stored["trainer"]["iteration"] == 1  # not one ahead
    train(tmp_path, [20.0], start=2)
    assert weight(tmp_path, "model_final") == 2 and weight(tmp_path, "model_best") == 1


@pytest.mark.fault(28)
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04cut", None])
def test_a_damaged_best_is_said_and_not_replaced_by_a_worse_one(tmp_path, caplog, content):
    train(tmp_path, [30.0, 10.0, 5.0])  # the checkpoint of the last iteration knows of the 30
    path = tmp_path / "model_best.pth"
    path.unlink() if content is None else path.write_bytes(content)
    train(tmp_path, [20.0], start=3)
    assert not path.exists() if content is None else path.read_bytes() == content
    (said,) = warnings(caplog)
    assert f"{path} cannot be used: it " in said
    assert "It is replaced when bbox/AP exceeds 30.000, of iteration 0." in said
    train(tmp_path, [31.0], start=4)
    assert weight(tmp_path, "model_best") == 4


@pytest.mark.fault(28)
def test_a_damaged_best_of_which_nothing_is_known_is_replaced(tmp_path, caplog):
    train(tmp_path, [30.0])  # the last evaluation comes after the last checkpoint
    (tmp_path / "model_best.pth").write_bytes(b"PK\x03\x04cut")
    train(tmp_path, [20.0], start=1)
    assert "It is replaced by the next evaluation." in warnings(caplog)[0]
    assert weight(tmp_path, "model_best") == 1


class Late(HookBase):
    """An evaluation that a resumed training makes up for, beside a value of an older one."""

    def __init__(self, value):
        self.value = value

    def before_train(self):
        if self.trainer.start_iter:
            storage, last = self.trainer.storage, self.trainer.start_iter - 1
            storage.put_scalar("bbox/AP", 90.0, cur_iter=last - 1)
            if self.value is not None:
                storage.put_scalar("bbox/AP", self.value, cur_iter=last)


@pytest.mark.parametrize("value, best", [(50.0, 50.0), (20.0, 30.0), (None, 30.0)])
def test_an_evaluation_made_up_for_counts_and_an_older_value_does_not(tmp_path, value, best):
    train(tmp_path, [30.0, 10.0])
    trainer = Counter(torch.nn.Linear(1, 1))
    checkpointer = DNCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
    hook = BestCheckpointer(checkpointer, "bbox/AP", period=5)
    trainer.register_hooks([Late(value), hook])
    checkpointer.resume(find_checkpoint(tmp_path), categories=[])
    trainer.train(2, 4)
    assert hook.best == best
    stored = read_checkpoint(tmp_path / "model_best.pth")
    assert stored["best"]["value"] == best
    assert stored["iteration"] == stored["trainer"]["iteration"] == (1 if value == 50 else 0)


def test_a_metric_that_is_never_computed_is_said(tmp_path, caplog):
    trainer = Counter(torch.nn.Linear(1, 1))
    checkpointer = DNCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([BestCheckpointer(checkpointer, "bbox_ema/AP", period=2)])
    trainer.train(0, 4)
    assert len(warnings(caplog)) == 2  # after 2 and after 4 iterations
    assert "train.best_metric=bbox_ema/AP was not computed" in warnings(caplog)[0]
    assert not names(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite_is_no_best(tmp_path, value):
    assert train(tmp_path, [value, 5.0, value]).best == 5.0


@pytest.mark.fault(27)
def test_number_of_files_over_three_resumes(tmp_path):
    (tmp_path / "model_mine.pth").write_text("mine")
    for start in (0, 3, 7, 9):
        length = {0: 3, 3: 4, 7: 2, 9: 5}[start]
        best = 100.0 if start == 0 else 0.0
        train(tmp_path, [best] * length, start, checkpoint_period=1, max_to_keep=2)
        last = start + length - 1
        kept = [*numbered(last - 1, last), "model_best.pth", "model_final.pth", "model_mine.pth"]
        assert names(tmp_path) == kept
    assert weight(tmp_path, "model_best") == 0


@pytest.mark.fault(27)
def test_files_of_a_future_that_was_given_up_go_first(tmp_path):
    train(tmp_path, [1.0] * 6, checkpoint_period=1, max_to_keep=4)
    for name in ("model_final.pth", *numbered(5, 4, 3)):
        (tmp_path / name).write_bytes(b"cut")
    (tmp_path / "model_best.pth").unlink()
    train(tmp_path, [1.0], start=3, checkpoint_period=1, max_to_keep=3, max_iter=4)
    assert [name for name in names(tmp_path) if "_0" in name] == numbered(2, 3, 5)
    assert weight(tmp_path, "model_0000003") == 3


def test_no_file_goes_before_the_new_one_is_there(tmp_path, monkeypatch):
    train(tmp_path, [1.0] * 3, checkpoint_period=1, max_to_keep=3)
    before = names(tmp_path)
    fail(monkeypatch, lambda name: True)
    with pytest.raises(CheckpointError):
        train(tmp_path, [1.0] * 3, start=3, checkpoint_period=1, max_to_keep=3)
    assert names(tmp_path) == before


def fail(monkeypatch, when, error=errno.ENOSPC):
    """Makes writing fail halfway for the files whose name `when` accepts; returns the names."""
    tried = []

    def save(data, file):
        name = Path(file.name).name[1 : -len(".tmp")]
        tried.append(name)
        if when(name):
            file.write(b"half a file")
            raise OSError(error, os.strerror(error))
        torch_save(data, file)

    torch_save = torch.save
    monkeypatch.setattr(writing.torch, "save", save)
    return tried


@pytest.mark.fault(24)
@pytest.mark.fault(26)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, caplog, error):
    """Period 4, ten iterations: the save after 4 fails, and is tried again 4 later, or at 6."""
    monkeypatch.setattr("dn_detr.engine.hooks._RETRY", 2)
    train(tmp_path, [5.0], max_iter=1)  # an intact one
    tried = fail(monkeypatch, lambda name: name == "model_0000003.pth", error)
    train(tmp_path, [1.0] * 9, start=1, checkpoint_period=4)
    assert tried == [*numbered(3, 5, 7), "model_final.pth"]
    assert names(tmp_path) == [*numbered(5, 7), "model_best.pth", "model_final.pth"]
    (said,) = warnings(caplog)
    assert said == (
        f"{tmp_path}/model_0000003.pth could not be saved: {os.strerror(error)}. The checkpoint "
        f"before it, model_final.pth, is whole. The next try comes after 6 of 10 iterations."
    )
    assert weight(tmp_path, "model_final") == 9


@pytest.mark.fault(24)
def test_last_checkpoint_names_the_good_one_while_the_disk_is_full(tmp_path, monkeypatch, caplog):
    seen = []

    class Look(HookBase):
        def after_step(self):
            path = find_checkpoint(tmp_path)
            seen.append((read_checkpoint(path)["iteration"], names(tmp_path)))

    fail(monkeypatch, lambda name: name not in ("model_0000000.pth", "model_final.pth"))
    train(tmp_path, [1.0] * 3, checkpoint_period=1, extra=[Look()])
    whole = numbered(0)
    assert seen == [(0, whole), (0, whole), (2, [*whole, "model_final.pth"])]
    assert any("model_best.pth could not be saved" in text for text in warnings(caplog))


@pytest.mark.fault(24)
def test_the_last_checkpoint_that_fails_ends_the_training(tmp_path, monkeypatch, caplog):
    tried = fail(monkeypatch, lambda name: name == "model_final.pth")
    with pytest.raises(CheckpointError) as error:
        train(tmp_path, [1.0] * 3 + [9.0], checkpoint_period=3)
    problem = (
        f"{tmp_path}/model_final.pth could not be saved: No space left on device. The checkpoint "
        f"before it, model_0000002.pth, is whole."
    )
    assert str(error.value) == f"{problem} Make room there, then --resume."
    assert warnings(caplog) == [f"{problem} The next try comes after the last evaluation."]
    assert tried[-3:] == ["model_final.pth", "model_best.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    monkeypatch.undo()
    (tmp_path / "model_best.pth").unlink()
    train(tmp_path, [1.0], start=3)
    assert weight(tmp_path, "model_final") == 3


@pytest.mark.fault(24)
def test_the_last_checkpoint_is_tried_again_after_the_last_evaluation(tmp_path, monkeypatch):
    seen = []
    fail(monkeypatch, lambda name: name == "model_final.pth" and not seen)

    class Evaluated(HookBase):
        def after_train(self):
            seen.append(True)

    trainer = Counter(torch.nn.Linear(1, 1))
    checkpointer = DNCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([Evaluated(), FinalCheckpointer(checkpointer)])
    trainer.train(0, 4)
    stored = read_checkpoint(tmp_path / "model_final.pth")
    assert stored["iteration"] == stored["trainer"]["iteration"] == 3  # not one ahead
    assert stored["model"]["weight"].item() == 3


@pytest.mark.fault(24)
def test_a_training_that_failed_leaves_no_final_checkpoint(tmp_path):
    class Fails(HookBase):
        def after_step(self):
            raise RuntimeError("something else")

    trainer = Counter(torch.nn.Linear(1, 1))
    checkpointer = DNCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([Fails(), FinalCheckpointer(checkpointer)])
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train(0, 1)
    assert not names(tmp_path)


@pytest.mark.fault(24)
def test_best_weights_that_cannot_be_saved_are_not_the_best(tmp_path, monkeypatch, caplog):
    train(tmp_path, [10.0])
    with monkeypatch.context() as context:
        fail(context, lambda name: name == "model_best.pth")
        best = train(tmp_path, [50.0, 40.0], start=1)
    assert (best.best, best.best_iteration) == (10.0, 0)
    assert weight(tmp_path, "model_best") == 0
    assert len(warnings(caplog)) == 2
    assert "is whole. The next evaluation is the next try." in warnings(caplog)[0]
    train(tmp_path, [20.0], start=3)
    assert weight(tmp_path, "model_best") == 3


def test_save_now(tmp_path, monkeypatch, caplog):
    said = []

    class Stop(HookBase):
        def after_step(self):
            said.append(self.trainer.periodic.save_now())

    tried = fail(monkeypatch, lambda name: name == "model_0000002.pth")
    train(tmp_path, [0.0] * 4, checkpoint_period=2, extra=[Stop()])
    assert said == [True, True, False, True]
    assert [name for name in tried if "_0" in name] == numbered(0, 1, 2, 3)
    (text,) = warnings(caplog)
    assert text.endswith("model_0000001.pth, is whole.")


class Keeper(HookBase):
    """A hook with state of all sorts."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return {} if self.state is None else self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.fault(31)
def test_the_state_of_a_hook_is_made_plain_or_refused_when_it_is_saved(tmp_path):
    state = {"best": np.float64(0.5), "path": Path("out/a"), "counts": np.arange(2)}
    train(tmp_path, [1.0], extra=[Keeper(state)])
    hook = Keeper()
    train(tmp_path, [1.0], start=1, extra=[hook])
    assert hook.state["best"] == 0.5 and type(hook.state["best"]) is float
    assert hook.state["path"] == "out/a" and hook.state["counts"].tolist() == [0, 1]
    where = r"checkpoint\['trainer'\]\['hooks'\]\['Keeper'\]\['model'\] is of type Linear"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError, match=where):
        train(tmp_path, [0.0], extra=[Keeper({"model": torch.nn.Linear(1, 1)})])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
