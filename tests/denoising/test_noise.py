"""Noise: its bounds, its distribution, and what it leaves alone."""

import pytest
import torch
from torchvision.ops import box_convert, box_iou

from dn_detr.denoising import noise_boxes, noise_labels


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
    assert torch.equal(noise_labels(labels, 0.0, 9), labels)
