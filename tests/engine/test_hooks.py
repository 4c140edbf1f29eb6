"""The best checkpoint."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine import hooks
from detectron2.engine.train_loop import TrainerBase

from dn_detr.checkpoint.checkpointer import DNCheckpointer
from dn_detr.engine.hooks import BestCheckpointer


class Counter(TrainerBase):
    """Trains nothing: the weight is the number of the iteration."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def run_step(self):
        self.model.weight.data.fill_(self.iter)


def train(folder, values, start=0, checkpoint_period=100):
    """Runs len(values) iterations, each evaluated, with these values of the metric."""
    trainer = Counter(torch.nn.Linear(1, 1))
    checkpointer = DNCheckpointer(trainer.model, str(folder), trainer=trainer)
    remaining = iter(values)
    best = BestCheckpointer(checkpointer, "bbox/AP", period=1)
    trainer.register_hooks(
        [
            hooks.PeriodicCheckpointer(checkpointer, checkpoint_period),
            hooks.EvalHook(1, lambda: {"bbox": {"AP": next(remaining)}}),
            best,
        ]
    )
    trainer.train(start, start + len(values))
    return best


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite_is_no_best(tmp_path, value):
    assert train(tmp_path, [value, 5.0, value]).best == 5.0
