"""Matching: against SciPy on costs written out image by image."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

from dn_detr.layers import Targets
from dn_detr.modeling import HungarianMatcher, Predictions


def make_case(counts, num_layers=3, num_queries=8, num_classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (num_layers, len(counts), num_queries)
    predictions = Predictions(
        torch.randn(*shape, num_classes, generator=g), torch.rand(*shape, 4, generator=g)
    )
    labels = [torch.randint(0, num_classes, (n,), generator=g) for n in counts]
    boxes = [torch.rand(n, 4, generator=g) * 0.5 + 0.1 for n in counts]
    return predictions, labels, boxes


def plain_cost(logits, boxes, labels, wanted):
    """DETR's cost with the focal class term, for one layer of one image: [Q, m]"""
    p = logits.sigmoid()[:, labels]
    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    giou = generalized_box_iou(
        box_convert(boxes, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy")
    )
    return 2 * focal + 5 * torch.cdist(boxes, wanted, p=1) - 2 * giou


@pytest.mark.parametrize("counts", [(3, 5), (0, 4), (12, 1), (0, 0)])
def test_pairs_equal_those_of_every_image_alone(counts):
    predictions, labels, boxes = make_case(counts)
    assignment = HungarianMatcher()(predictions, Targets.pad(labels, boxes))
    for layer in range(3):
        for image, (slots, rows) in enumerate(assignment.pairs(layer)):
            cost = plain_cost(
                predictions.logits[layer, image],
                predictions.boxes[layer, image],
                labels[image],
                boxes[image],
            )
            expected = linear_sum_assignment(cost.numpy())
            assert slots.tolist() == expected[0].tolist()
            assert rows.tolist() == expected[1].tolist()
            assert len(slots) == min(
                counts[image], 8
            )  # more objects than queries: some stay without


def test_cost_equals_the_plain_one():
    predictions, labels, boxes = make_case((3, 5))
    cost = HungarianMatcher().cost(predictions, Targets.pad(labels, boxes))
    for image, count in enumerate((3, 5)):
        expected = plain_cost(
            predictions.logits[1, image], predictions.boxes[1, image], labels[image], boxes[image]
        )
        torch.testing.assert_close(cost[1, image, :, :count], expected, rtol=1e-4, atol=1e-4)


def test_saturated_bfloat16_logits_still_match():
    predictions, labels, boxes = make_case((3, 2))
    saturated = Predictions((predictions.logits * 50).bfloat16(), predictions.boxes.bfloat16())
    wide = Predictions(saturated.logits.float(), saturated.boxes.float())
    targets = Targets.pad(labels, boxes)
    cost = HungarianMatcher().cost(saturated, targets)
    assert cost.isfinite().all() and torch.equal(cost, HungarianMatcher().cost(wide, targets))


def test_a_cost_that_is_not_a_number_names_layer_and_image():
    predictions, labels, boxes = make_case((3, 2))
    predictions.boxes[1, 1, 4] = float("nan")
    with pytest.raises(ValueError, match="decoder layer 1 for image 1 of the batch"):
        HungarianMatcher()(predictions, Targets.pad(labels, boxes))
