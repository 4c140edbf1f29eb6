"""Boxes: against torchvision, and at the edges where denominators vanish."""

import pytest
import torch
from torchvision.ops import generalized_box_iou as pairwise_giou

from dn_detr.layers import generalized_box_iou, inverse_sigmoid


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, 2, generator=generator, dtype=torch.float64)
    return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)


def test_giou_of_all_pairs_equals_torchvision():
    a, b = random_boxes(7), random_boxes(5, seed=1)
    ours = generalized_box_iou(a[:, None], b[None], eps=0)
    torch.testing.assert_close(ours, pairwise_giou(a, b))


def test_giou_broadcasts_over_leading_axes_and_is_the_diagonal_of_all_pairs():
    a, b = random_boxes(3, 4), random_boxes(3, 4, seed=1)
    pairs = generalized_box_iou(a[:, :, None], b[:, None])
    assert pairs.shape == (3, 4, 4)
    torch.testing.assert_close(generalized_box_iou(a, b), pairs.diagonal(dim1=1, dim2=2))


def test_giou_of_empty_and_inverted_boxes_is_finite_with_finite_gradients():
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.6, 0.6, 0.4, 0.4], [0, 0, 1, 1]])
    boxes.requires_grad_()
    giou = generalized_box_iou(boxes[:, None], boxes.detach()[None])
    giou.sum().backward()
    assert giou.isfinite().all() and boxes.grad.isfinite().all()
    assert giou[2, 2].item() == pytest.approx(1, abs=1e-5)


def test_inverse_sigmoid_inverts_inside_and_is_bounded_outside():
    x = torch.linspace(0.002, 0.998, 50, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    expected = torch.tensor([1e-3, 1e-3, 1e3, 1e3]).log()
    torch.testing.assert_close(ends, expected, rtol=1e-4, atol=1e-4)


def test_inverse_sigmoid_computes_in_float32():
    assert inverse_sigmoid(torch.rand(3).bfloat16()).dtype == torch.float32
