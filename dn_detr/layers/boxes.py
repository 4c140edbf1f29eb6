"""Box arithmetic that broadcasts: for the matcher's pairs and for the criterion's diagonal.

Conversions between ``cxcywh`` and ``xyxy`` are `torchvision.ops.box_convert`'s.
"""

import torch
from torch import Tensor


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logit of `x`, in float32, with numerator and denominator kept above `eps`.

    DN-DETR and DAB-DETR use 1e-3 (Deformable-DETR: 1e-5): no side of an anchor is represented below
    a thousandth of the image.

    Args:
        x: any shape, values in 0..1 (others are clamped).
        eps: lower bound of both x and 1 - x.

    Returns:
        Tensor of the shape of `x`, float32 (float64 stays float64).
    """
    x = x if x.dtype == torch.float64 else x.float()
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-6) -> Tensor:
    """Elementwise generalised IoU (Rezatofighi et al., CVPR 2019) with broadcasting.

    ``[..., N, 1, 4]`` against ``[..., 1, M, 4]`` gives all pairs; equal shapes give the diagonal
    alone, without the N x N matrix of which `torchvision.ops.generalized_box_iou` would compute it.

    Args:
        boxes1, boxes2: [..., 4] as xyxy. Boxes without area are fine; inverted ones count as empty.
        eps: added to both denominators, as the authors' code does.

    Returns:
        Tensor of the broadcast shape without the last axis, in -1..1.
    """
    # Coordinate by coordinate: for all pairs 1.4 to 2.9 times as fast as with a last axis of two.
    left1, top1, right1, bottom1 = boxes1.unbind(-1)
    left2, top2, right2, bottom2 = boxes2.unbind(-1)
    intersection = _area(
        torch.maximum(left1, left2),
        torch.maximum(top1, top2),
        torch.minimum(right1, right2),
        torch.minimum(bottom1, bottom2),
    )
    hull = _area(
        torch.minimum(left1, left2),
        torch.minimum(top1, top2),
        torch.maximum(right1, right2),
        torch.maximum(bottom1, bottom2),
    )
    areas = _area(left1, top1, right1, bottom1) + _area(left2, top2, right2, bottom2)
    union = areas - intersection
    return intersection / (union + eps) - (hull - union) / (hull + eps)


def _area(left: Tensor, top: Tensor, right: Tensor, bottom: Tensor) -> Tensor:
    """Zero where a side is negative."""
    return (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
