"""Noise: its bounds, its distribution, and what it leaves alone."""

import pytest
import torch
from torchvision.ops import box_convert, box_iou

from dn_detr.denoising import noise_boxes, noise_corners, noise_labels


@pytest.mark.parametrize("center, size", [(0.4, 0.4), (0.2, 0.7), (0.0, 0.4), (0.4, 0.0)])
def test_box_noise_stays_within_its_bounds_and_reaches_them(center, size):
    torch.manual_seed(0)
    boxes = torch.tensor([0.5, 0.4, 0.2, 0.1]).expand(20000, 4)
    noised = noise_boxes(boxes, center, size)
    shift = (noised[:, :2] - boxes[:, :2]) / (boxes[:, 2:] / 2)
    scale = noised[:, 2:] / boxes[:, 2:] - 1
    for value, bound in ((shift, center), (scale, size)):
        assert value.abs().max() <= bound + 1e-5
        assert value.amax(0).min() >= 0.99 * bound - 1e-5
        assert value.amin(0).max() <= -0.99 * bound + 1e-5
        assert value.mean().abs() <= 0.01
    # The four numbers are independent of each other.
    if center and size:
        correlation = torch.cat([shift, scale], 1).T.corrcoef() - torch.eye(4)
        assert correlation.abs().max() < 0.05


def test_box_noise_clamps_numbers_and_not_corners():
    torch.manual_seed(0)
    noised = noise_boxes(torch.tensor([0.98, 0.02, 0.9, 0.9]).expand(5000, 4), 0.4, 0.4)
    assert noised.min() >= 0 and noised.max() <= 1
    assert (noised[:, 0] + noised[:, 2] / 2).max() > 1.2  # sticks out of the image, as published


def test_mean_overlap_with_the_clean_box_is_the_measured_one():
    torch.manual_seed(0)
    boxes = torch.tensor([0.5, 0.5, 0.3, 0.2]).expand(100000, 4)
    noised = box_convert(noise_boxes(boxes, 0.4, 0.4), "cxcywh", "xyxy")
    iou = box_iou(box_convert(boxes[:1], "cxcywh", "xyxy"), noised)
    assert iou.mean().item() == pytest.approx(0.60, abs=0.01)
    assert (iou < 0.7).float().mean().item() == pytest.approx(0.87, abs=0.01)


NO, YES = torch.tensor(False), torch.tensor(True)


def moved_corners(box, noised):
    """By how much of half its width or height each corner coordinate has moved."""
    moved = box_convert(noised, "cxcywh", "xyxy") - box_convert(box, "cxcywh", "xyxy")
    return moved / (box[[2, 3, 2, 3]] / 2)


@pytest.mark.parametrize("negative, low, high", [(NO, 0.0, 0.4), (YES, 0.4, 0.8)])
def test_corner_noise_stays_within_its_bounds_and_reaches_them(negative, low, high):
    torch.manual_seed(0)
    box = torch.tensor([0.5, 0.4, 0.2, 0.1])
    moved = moved_corners(box, noise_corners(box.expand(20000, 4), 0.4, negative))
    size = moved.abs()
    assert size.min() >= low - 1e-5 and size.max() <= high + 1e-5
    assert size.amin(0).max() <= low + 0.01 and size.amax(0).min() >= high - 0.01
    assert size.mean().item() == pytest.approx((low + high) / 2, abs=0.005)  # uniform between
    assert (moved > 0).float().mean(0).sub(0.5).abs().max() < 0.02
    correlation = moved.T.corrcoef() - torch.eye(4)
    assert correlation.abs().max() < 0.05


def test_every_box_has_its_own_kind_of_corner_noise():
    torch.manual_seed(0)
    boxes, negative = torch.tensor([0.5, 0.4, 0.2, 0.1]).expand(3, 50, 4), torch.arange(50) % 3 == 0
    size = moved_corners(boxes[0, 0], noise_corners(boxes, 0.4, negative)).abs()
    assert (size[:, negative] >= 0.4 - 1e-5).all() and (size[:, ~negative] <= 0.4 + 1e-5).all()


def test_corner_noise_ends_at_the_image():
    torch.manual_seed(0)
    boxes = torch.tensor([[0.98, 0.02, 0.04, 0.04], [0.5, 0.5, 1, 1]]).repeat(2000, 1)
    for negative in (NO, YES):
        corners = box_convert(noise_corners(boxes, 1.0, negative), "cxcywh", "xyxy")
        assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6


def test_corners_that_pass_each_other():
    """Shares and overlaps as measured on DINO's published code."""
    box = torch.tensor([0.5, 0.5, 0.2, 0.1]).expand(100000, 4)
    noised = {}
    for negative in (NO, YES):
        for swap in (False, True):
            torch.manual_seed(0)
            noised[bool(negative), swap] = noise_corners(box, 1.0, negative, swap)
    assert torch.equal(noised[False, False], noised[False, True])  # positives never do
    assert noised[False, False][:, 2:].min() >= 0
    cut, swapped = noised[True, False], noised[True, True]
    inverted = cut[:, 2:] == 0
    assert inverted.any(1).float().mean().item() == pytest.approx(0.437, abs=0.01)
    assert torch.equal(cut[:, :2], swapped[:, :2]) and (swapped[:, 2:] > 0).all()
    torch.testing.assert_close(cut[:, 2:][~inverted], swapped[:, 2:][~inverted])
    for kind, expected in ((False, 0.385), (True, 0.109)):
        boxes = box_convert(noised[kind, True], "cxcywh", "xyxy")
        iou = box_iou(box_convert(box[:1], "cxcywh", "xyxy"), boxes)
        assert iou.mean().item() == pytest.approx(expected, abs=0.01)


def test_label_noise_replaces_the_stated_share_uniformly():
    torch.manual_seed(0)
    labels = torch.full((200000,), 2)
    noised = noise_labels(labels, 0.2, num_classes=5)
    assert (noised != labels).float().mean().item() == pytest.approx(0.2 * 4 / 5, abs=0.005)
    counts = noised.bincount(minlength=5).float() / len(labels)
    torch.testing.assert_close(counts[[0, 1, 3, 4]], torch.full((4,), 0.04), rtol=0, atol=0.003)


def test_label_noise_draws_from_the_named_classes_only():
    torch.manual_seed(0)
    labels = torch.zeros(2000, dtype=torch.long)
    drawn = noise_labels(labels, 1.0, num_classes=91, choices=[1, 13, 90])
    assert drawn.unique().tolist() == [1, 13, 90]
    assert noise_labels(labels, 1.0, num_classes=91).unique().numel() == 91


def test_no_noise_changes_nothing():
    boxes, labels = torch.rand(9, 4), torch.arange(9)
    assert torch.equal(noise_boxes(boxes, 0, 0), boxes)
    inside = torch.cat([boxes[:, :2] / 2 + 0.25, boxes[:, 2:] / 2], 1)
    torch.testing.assert_close(noise_corners(inside, 0, torch.arange(9) < 4), inside)
    assert torch.equal(noise_labels(labels, 0.0, 9), labels)
