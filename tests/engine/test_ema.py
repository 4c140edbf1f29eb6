"""The averaged weights."""

import pytest
import torch

pytest.importorskip("detectron2")

from dn_detr.engine.ema import WeightAverage

from tests.engine.tiny import TinyDetector


def changed(model, value):
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(value)
    return model


def test_average_follows_the_formula():
    model = TinyDetector(3)
    average = WeightAverage(model, decay=0.4)
    expected = None
    for update, value in enumerate([2.0, 5.0, -1.0, 3.0, 4.0, 4.0, 8.0, 1.0]):
        average.update(changed(model, value))
        decay = min(0.4, (1 + update) / (10 + update)) if update else 0.0
        expected = value if expected is None else decay * expected + (1 - decay) * value
        for tensor in average.model.parameters():
            torch.testing.assert_close(tensor, torch.full_like(tensor, expected))
        for tensor, source in zip(average.model.buffers(), model.buffers()):
            assert torch.equal(tensor, source)  # buffers are copied, not averaged
    assert average.updates == 8


def test_decay_warms_up():
    average = WeightAverage(TinyDetector(3), decay=0.9997)
    assert average.decay_at(1) == pytest.approx(2 / 11)
    assert average.decay_at(990) == pytest.approx(991 / 1000)
    assert average.decay_at(10**6) == 0.9997


def test_first_update_copies_weights_loaded_after_the_average_was_made():
    model = TinyDetector(3)
    average = WeightAverage(model)
    average.update(changed(model, 7.0))
    assert all((p == 7.0).all() for p in average.model.parameters())


def test_state_restores_the_average(tmp_path):
    model = TinyDetector(3)
    average = WeightAverage(model, decay=0.5)
    for value in (1.0, 2.0, 4.0):
        average.update(changed(model, value))
    torch.save(average.state_dict(), tmp_path / "ema.pth")
    restored = WeightAverage(TinyDetector(3), decay=0.5)
    restored.load_state_dict(torch.load(tmp_path / "ema.pth", weights_only=True))
    assert restored.updates == 3
    for each in (average, restored):
        each.update(changed(model, 8.0))
    for one, other in zip(average.model.parameters(), restored.model.parameters()):
        assert torch.equal(one, other)


def test_the_averaged_model_trains_nothing_and_is_in_eval_mode():
    average = WeightAverage(TinyDetector(3).train())
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
