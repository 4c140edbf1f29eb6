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
    area1 = (boxes1[..., 2:] - boxes1[..., :2]).clamp(min=0).prod(-1)
    area2 = (boxes2[..., 2:] - boxes2[..., :2]).clamp(min=0).prod(-1)
    overlap = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(
        boxes1[..., :2], boxes2[..., :2]
    )
    intersection = overlap.clamp(min=0).prod(-1)
    union = area1 + area2 - intersection
    hull = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(
        boxes1[..., :2], boxes2[..., :2]
    )
    hull_area = hull.clamp(min=0).prod(-1)
    return intersection / (union + eps) - (hull_area - union) / (hull_area + eps)
