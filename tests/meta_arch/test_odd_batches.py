"""Batches without a box, with a thousand, and outputs that are not finite, through every family."""

import pytest
import torch

from dn_detr.denoising.budget import groups_within
from dn_detr.engine.trainer import Trainer
from detectron2.engine import default_setup  # noqa: F401
from tests.meta_arch.small import FAMILIES, small_model
from tests.meta_arch.test_dn_detr import make_input

by_family = pytest.mark.parametrize("family", FAMILIES)


def trained_by(model, batch):
    """The losses of a batch; asserts that they are finite and train every parameter."""
    model.zero_grad(set_to_none=True)
    losses = model(batch)
    assert [name for name, loss in losses.items() if not loss.isfinite()] == []
    sum(losses.values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert [name for name, p in trained.items() if not p.grad.isfinite().all()] == []
    return losses


@pytest.mark.fault(48)
@pytest.mark.fault(61)
@by_family
@pytest.mark.parametrize("with_denoising", [True, False])
def test_batches_with_and_without_boxes_train_every_parameter(family, with_denoising):
    model = small_model(family).train()
    if not with_denoising:
        model.denoising = None
    names = [
        set(trained_by(model, [make_input(96, 128, a), make_input(64, 80, b, seed=1)]))
        for a, b in ((3, 2), (0, 2), (0, 0))
    ]
    assert names[0] == names[1] == names[2]
    assert any(name.startswith("dn_") for name in names[0]) == with_denoising


@pytest.mark.fault(49)
@by_family
def test_a_thousand_boxes_for_twenty_queries(family, caplog, fresh_logs):
    model = small_model(family).train()
    batch = [make_input(96, 128, 1000), make_input(64, 80, 2, seed=1)]
    noised = model.denoising(model.targets(batch))
    generator = model.denoising
    assert noised.groups == groups_within(generator.budget, generator.groups, 1000) == 1
    assert len(noised) <= 2 * generator.budget
    for _ in range(2):
        trained_by(model, batch)
    said = [r.getMessage() for r in caplog.records if "an image has 1000 objects" in r.getMessage()]
    assert sum("groups, max(" in text for text in said) == (generator.groups is not None)
    assert sum("drawn anew" in text for text in said) == (generator.budget < 1000)


@pytest.mark.fault(54)
@by_family
def test_outputs_that_are_not_finite_stop_training_before_the_step(family):
    """Not SciPy's "matrix contains invalid numeric entries", which one process alone would meet."""
    model = small_model(family).train()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "heads" in name).fill_(float("nan"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader = [[make_input(96, 128), make_input(64, 80, seed=1)]]
    with pytest.raises(FloatingPointError, match="loss_(ce|bbox).*=nan"):
        Trainer(model, loader, optimizer).train(0, 1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) or before[name].isnan().any()


@pytest.mark.fault(64)
@by_family
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_boxes_that_are_not_finite_are_not_evaluated(family, value):
    model = small_model(family).eval()
    predict = model.predict

    def broken(batch, noised=None):
        predictions, images = predict(batch, noised)
        predictions.boxes[-1, 0, 7, 2] = value
        return predictions, images

    model.predict = broken
    with torch.no_grad(), pytest.raises(ValueError, match="image 17: the predictions are not fin"):
        model([make_input(96, 128, image_id=17)])
