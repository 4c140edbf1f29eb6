"""What an image's detections owe to the other images of its batch: nothing, or padding only."""

import pytest
import torch

from tests.meta_arch.small import FAMILIES, small_model
from tests.meta_arch.test_dn_detr import make_input

by_family = pytest.mark.parametrize("family", FAMILIES)


def detect(model, inputs):
    with torch.no_grad():
        return [output["instances"] for output in model.eval()(inputs)]


def check_same(a, b, tolerance):
    torch.testing.assert_close(a.scores, b.scores, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        a.pred_boxes.tensor / 100, b.pred_boxes.tensor / 100, rtol=tolerance, atol=tolerance
    )
    assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.fault(65)
@by_family
@pytest.mark.parametrize("one_by_one", [False, True])
def test_images_of_one_size_are_detected_alike_alone_and_in_a_batch(family, one_by_one):
    model = small_model(family, detect_one_by_one=one_by_one, detections_per_image=10)
    inputs = [make_input(96, 128, seed=seed) for seed in range(3)]
    alone = [detect(model, [x])[0] for x in inputs]
    for a, b in zip(alone, detect(model, inputs)):
        assert len(a) == 10
        check_same(a, b, 1e-4)


@pytest.mark.fault(65)
@by_family
def test_one_by_one_an_image_has_no_batch_mates(family):
    model = small_model(family, detections_per_image=10)  # as shipped
    inputs = [make_input(96, 128), make_input(64, 80, seed=1), make_input(128, 72, seed=2)]
    for x, found in zip(inputs, detect(model, inputs)):
        check_same(found, detect(model, [x])[0], 0)


@by_family
def test_in_a_batch_padding_moves_the_smaller_image(family):
    """Why the default is one by one. The largest image has no padding, and does not move."""
    model = small_model(family, detect_one_by_one=False)
    inputs = [make_input(128, 160), make_input(64, 80, seed=1)]
    with torch.no_grad():
        together = model.eval().predict(inputs)[0]
        large, small = (model.predict([x])[0] for x in inputs)
    torch.testing.assert_close(together.boxes[-1, :1], large.boxes[-1], rtol=1e-3, atol=1e-4)
    assert (together.logits[-1, 1] - small.logits[-1, 0]).abs().max() > 1e-3


@by_family
def test_a_batch_of_all_sizes_trains(family):
    model = small_model(family).train()
    losses = model([make_input(96, 128, 0), make_input(64, 80, 3, seed=1), make_input(33, 200, 1)])
    assert all(loss.isfinite() for loss in losses.values())
    assert ("enc_loss_ce" in losses) == ("dino" in family)
