"""Losses: against loops over layers, images and pairs; and what must not enter them."""

from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from dn_detr.denoising import DenoisingGenerator
from dn_detr.layers import Targets
from dn_detr.modeling import HungarianMatcher, Predictions, SetCriterion
from dn_detr.modeling.criterion import world_mean

from .test_matcher import make_case

COUNTS = [(3, 5), (0, 4), (0, 0), (11, 2)]


def plain_losses(predictions, pairs, labels, boxes, layer):
    """Sums of the three losses of one layer, image by image."""
    sums = {"loss_ce": 0.0, "loss_bbox": 0.0, "loss_giou": 0.0}
    for image, (slots, rows) in enumerate(pairs):
        logits, predicted = predictions.logits[layer, image], predictions.boxes[layer, image]
        one_hot = torch.zeros_like(logits)
        one_hot[slots, labels[image][rows]] = 1
        sums["loss_ce"] += sigmoid_focal_loss(logits, one_hot, reduction="sum")
        wanted = boxes[image][rows]
        sums["loss_bbox"] += (predicted[slots] - wanted).abs().sum()
        sums["loss_giou"] += generalized_box_iou_loss(
            box_convert(predicted[slots], "cxcywh", "xyxy"),
            box_convert(wanted, "cxcywh", "xyxy"),
            "sum",
        )
    return sums


@pytest.mark.parametrize("counts", COUNTS)
def test_matching_losses_equal_the_loops(counts):
    predictions, labels, boxes = make_case(counts)
    targets = Targets.pad(labels, boxes)
    criterion = SetCriterion(HungarianMatcher(), ce_weight=1.5)
    losses = criterion(predictions, targets)
    assert len(losses) == 9
    assignment = HungarianMatcher()(predictions, targets)
    for layer, suffix in enumerate(("_0", "_1", "")):
        expected = plain_losses(predictions, assignment.pairs(layer), labels, boxes, layer)
        for name, weight in (("loss_ce", 1.5), ("loss_bbox", 5), ("loss_giou", 2)):
            wanted = torch.as_tensor(
                weight * expected[name] / max(sum(counts), 1), dtype=torch.float32
            )
            torch.testing.assert_close(losses[name + suffix], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", COUNTS)
def test_denoising_losses_equal_the_loops(counts):
    _, labels, boxes = make_case(counts)
    targets = Targets.pad(labels, boxes)
    noised = DenoisingGenerator(5, groups=3)(targets)
    denoising, *_ = make_case(counts, num_queries=len(noised))
    matching, *_ = make_case(counts)
    losses = SetCriterion(HungarianMatcher(), dn_normalizer="local")(
        matching, targets, denoising, noised
    )
    assert len(losses) == 18
    # Only slots that hold a noised target count: cut the others out of predictions and pairs.
    sums = {"loss_ce": 0.0, "loss_bbox": 0.0, "loss_giou": 0.0}
    for image, (slots, rows) in enumerate(noised.assignment().pairs()):
        alone = Predictions(
            denoising.logits[:, image : image + 1, slots],
            denoising.boxes[:, image : image + 1, slots],
        )
        pairs = [(torch.arange(len(slots)), rows)]
        for name, value in plain_losses(
            alone, pairs, labels[image:], boxes[image:], layer=-1
        ).items():
            sums[name] += value
    for name, weight in (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2)):
        wanted = torch.as_tensor(weight * sums[name] / max(3 * sum(counts), 1), dtype=torch.float32)
        torch.testing.assert_close(losses[f"dn_{name}"], wanted, rtol=1e-4, atol=1e-5)


def test_unused_denoising_slots_have_no_gradient():
    _, labels, boxes = make_case((1, 4))
    targets = Targets.pad(labels, boxes)
    noised = DenoisingGenerator(5, groups=2)(targets)
    denoising, *_ = make_case((1, 4), num_queries=8)
    denoising.logits.requires_grad_()
    denoising.boxes.requires_grad_()
    matching, *_ = make_case((1, 4))
    losses = SetCriterion(HungarianMatcher())(matching, targets, denoising, noised)
    sum(v for k, v in losses.items() if k.startswith("dn_")).backward()
    for gradient in (denoising.logits.grad, denoising.boxes.grad):
        used = gradient.abs().sum((0, 3)) > 0
        assert torch.equal(used, noised.valid)


def test_normalizers_are_equal_in_one_process_and_differ_in_an_unequal_world(monkeypatch):
    _, labels, boxes = make_case((1, 4))
    targets = Targets.pad(labels, boxes)
    noised = DenoisingGenerator(5, groups=2)(targets)
    denoising, *_ = make_case((1, 4), num_queries=8)
    matching, *_ = make_case((1, 4))

    def run(normalizer):
        return SetCriterion(HungarianMatcher(), dn_normalizer=normalizer)(
            matching, targets, denoising, noised
        )

    alone = run("local")
    torch.testing.assert_close(alone, run("global"))
    # A world of two whose other process has 15 objects: the mean is 10, twice what is here.
    monkeypatch.setattr(
        "dn_detr.modeling.criterion.world_mean", lambda value, device: torch.tensor(10.0)
    )
    local, world = run("local"), run("global")
    torch.testing.assert_close(local["loss_bbox"], alone["loss_bbox"] / 2)
    torch.testing.assert_close(local["dn_loss_bbox"], alone["dn_loss_bbox"])
    torch.testing.assert_close(world["dn_loss_bbox"], alone["dn_loss_bbox"] / 2)


def test_an_unknown_normalizer_is_refused():
    with pytest.raises(ValueError, match=r"\('local', 'global'\), got 'world'"):
        SetCriterion(HungarianMatcher(), dn_normalizer="world")


def test_world_mean_of_one_process_is_the_value():
    assert world_mean(3.0, torch.device("cpu")).item() == 3


def test_padding_columns_of_the_targets_change_nothing():
    predictions, labels, boxes = make_case((2, 3))
    targets = Targets.pad(labels, boxes)
    wide = replace(
        targets,
        labels=torch.cat([targets.labels, torch.full((2, 4), 4)], 1),
        boxes=torch.cat([targets.boxes, torch.rand(2, 4, 4)], 1),
        valid=torch.cat([targets.valid, torch.zeros(2, 4, dtype=torch.bool)], 1),
    )
    criterion = SetCriterion(HungarianMatcher())
    torch.testing.assert_close(criterion(predictions, targets), criterion(predictions, wide))
