"""Losses: against loops over layers, images and pairs; and what must not enter them."""

from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from dn_detr.denoising import DenoisingGenerator
from dn_detr.layers import Targets
from dn_detr.modeling import HungarianMatcher, Predictions, SetCriterion
from dn_detr.modeling.criterion import world_mean

from .test_matcher import make_case, make_encoder, on_meta

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
    assignment, _ = HungarianMatcher()(predictions, targets)
    for layer, suffix in enumerate(("_0", "_1", "")):
        expected = plain_losses(predictions, assignment.pairs(layer), labels, boxes, layer)
        for name, weight in (("loss_ce", 1.5), ("loss_bbox", 5), ("loss_giou", 2)):
            wanted = torch.as_tensor(
                weight * expected[name] / max(sum(counts), 1), dtype=torch.float32
            )
            torch.testing.assert_close(losses[name + suffix], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("num_classes", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_encoder_losses_equal_the_loops(counts, num_classes, dtype):
    predictions, labels, boxes = make_case(counts)
    encoder = make_encoder(counts, 2100, num_classes)  # enough for candidates alone to be matched
    encoder = Predictions(encoder.logits.to(dtype), encoder.boxes.to(dtype))
    both = replace(predictions, encoder=encoder)
    targets = Targets.pad(labels, boxes)
    criterion = SetCriterion(HungarianMatcher(), ce_weight=1.5, enc_weight=0.5)
    losses = criterion(both, targets)
    assert len(losses) == 12
    torch.testing.assert_close(
        criterion(predictions, targets), {n: losses[n] for n in list(losses)[:9]}
    )
    _, assignment = HungarianMatcher()(both, targets)
    wide = Predictions(encoder.logits.float(), encoder.boxes.float())
    if num_classes == 1:
        labels = [torch.zeros_like(label) for label in labels]  # objectness
    expected = plain_losses(wide, assignment.pairs(), labels, boxes, layer=0)
    for name, weight in (("loss_ce", 1.5), ("loss_bbox", 5), ("loss_giou", 2)):
        wanted = torch.as_tensor(
            0.5 * weight * expected[name] / max(sum(counts), 1), dtype=torch.float32
        )
        torch.testing.assert_close(losses[f"enc_{name}"], wanted, rtol=1e-4, atol=1e-5)


def test_encoder_learns_from_its_own_losses():
    """Every token from the class loss, matched ones alone from the box losses."""
    predictions, labels, boxes = make_case((3, 5))
    encoder = make_encoder((3, 5), 20)
    encoder.logits.requires_grad_()
    encoder.boxes.requires_grad_()
    targets = Targets.pad(labels, boxes)
    losses = SetCriterion(HungarianMatcher())(replace(predictions, encoder=encoder), targets)
    sum(losses[f"enc_loss_{name}"] for name in ("ce", "bbox", "giou")).backward()
    assert (encoder.logits.grad.abs().sum(-1) > 0).all()
    assert (encoder.boxes.grad.abs().sum(-1) > 0).sum(-1).tolist() == [[3, 5]]


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


@pytest.mark.parametrize("classify_unused", [False, True])
def test_negatives_have_a_class_loss_alone(classify_unused):
    _, labels, boxes = make_case((1, 4))
    targets = Targets.pad(labels, boxes)
    noised = DenoisingGenerator(5, groups=2, contrastive=True, classify_unused=classify_unused)(
        targets
    )
    denoising, *_ = make_case((1, 4), num_queries=16)
    denoising.logits.requires_grad_()
    denoising.boxes.requires_grad_()
    matching, *_ = make_case((1, 4))
    losses = SetCriterion(HungarianMatcher())(matching, targets, denoising, noised)
    sum(v for k, v in losses.items() if k.startswith("dn_")).backward()
    classified = denoising.logits.grad.abs().sum((0, 3)) > 0
    assert torch.equal(classified, noised.valid | classify_unused)
    located = denoising.boxes.grad.abs().sum((0, 3)) > 0
    assert torch.equal(located, noised.valid & noised.positive)
    # The gradient of a class where it should be absent is positive: on all classes of negatives.
    negatives = noised.valid & ~noised.positive
    assert (denoising.logits.grad[:, negatives] > 0).all()


@pytest.mark.parametrize("normalizer, divisor", [("local", 1 + 4), ("global", 1 + 9)])
def test_objects_that_a_budget_leaves_out(normalizer, divisor):
    """Local: divided by what is noised. Global: a noised box weighs what a matched one does."""
    _, labels, boxes = make_case((1, 9))
    targets = Targets.pad(labels, boxes)
    noised = DenoisingGenerator(5, groups=2, budget=4)(targets)
    assert noised.counts == (1, 4) and noised.groups == 1
    denoising, *_ = make_case((1, 9), num_queries=4)
    matching, *_ = make_case((1, 9))
    losses = SetCriterion(HungarianMatcher(), dn_normalizer=normalizer)(
        matching, targets, denoising, noised
    )
    total = sum(
        (denoising.boxes[-1, image, slots] - boxes[image][rows]).abs().sum()
        for image, (slots, rows) in enumerate(noised.assignment().pairs())
    )
    torch.testing.assert_close(losses["dn_loss_bbox"], 5 * total / divisor)


def test_losses_need_no_number_on_the_host():
    """On a device without data, everything but the matcher works."""
    predictions, labels, boxes = make_case((3, 5))
    predictions = replace(predictions, encoder=make_encoder((3, 5), 50, 1))
    targets = Targets.pad(labels, boxes)
    pairs = [on_meta(assignment) for assignment in HungarianMatcher()(predictions, targets)]
    noised = on_meta(DenoisingGenerator(5, groups=2, contrastive=True)(targets))
    denoising, *_ = make_case((3, 5), num_queries=len(noised))
    matching = replace(on_meta(predictions), encoder=on_meta(predictions.encoder))
    losses = SetCriterion(lambda *_: pairs)(matching, on_meta(targets), on_meta(denoising), noised)
    assert len(losses) == 9 + 9 + 3 and all(loss.shape == () for loss in losses.values())


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
