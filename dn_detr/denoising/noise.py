"""Noise on boxes and labels, functions of tensors.

DN-DETR (Li et al., CVPR 2022, arXiv 2203.01305, sec. 4.2) and DINO (Zhang et al., ICLR 2023, arXiv
2203.03605, sec. 3.3).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert


def noise_boxes(boxes: Tensor, center_noise: float, size_noise: float) -> Tensor:
    """Shift and scale boxes.

    With u uniform in -1..1 for every number: the centre moves by ``u * center_noise * size / 2``,
    the size changes by the factor ``1 + u * size_noise``. Then each of the four numbers (not the
    corners) is clamped to 0..1, so a noised box may stick out of the image.

    Args:
        boxes: [..., 4] cxcywh in 0..1.
        center_noise: lambda_1 of the paper, 0.4. Below 1 the centre stays inside the box.
        size_noise: lambda_2 of the paper, 0.4, at most 1.

    Returns:
        Tensor of the shape of `boxes`.
    """
    center, size = boxes[..., :2], boxes[..., 2:]
    noise = torch.rand_like(boxes) * 2 - 1
    center = center + noise[..., :2] * center_noise * size / 2
    size = size * (1 + noise[..., 2:] * size_noise)
    return torch.cat([center, size], dim=-1).clamp(0, 1)


def noise_corners(
    boxes: Tensor, scale: float, negative: Tensor, swap_inverted: bool = False
) -> Tensor:
    """Move the corners of boxes, far enough in negatives that no object is there (DINO).

    Each of the four sides moves by ``scale * r * size / 2``, where size is the width or the height
    of the box, outwards or inwards; r is uniform in 0..1 for a positive, in 1..2 for a negative.
    Then the corners are clamped to the image.

    Args:
        boxes: [..., 4] cxcywh in 0..1.
        scale: 1 in DINO. Up to 1, positives keep their corners in order; negatives may not.
        negative: [...] bool, broadcastable to the boxes.
        swap_inverted: what becomes of a negative whose corners have passed each other: True swaps
            them (DEIM); False leaves no width or height (as good as DINO, where the logit of a
            negative size is that of the smallest).

    Returns:
        Tensor of the shape of `boxes`, cxcywh; every corner is in the image.
    """
    noise = torch.rand_like(boxes) * 2 - 1
    noise = torch.copysign(noise.abs() + negative[..., None], noise)
    half = torch.cat([boxes[..., 2:], boxes[..., 2:]], dim=-1) / 2
    corners = box_convert(boxes, "cxcywh", "xyxy") + noise * scale * half
    low, high = corners.clamp(0, 1).chunk(2, dim=-1)
    if swap_inverted:
        low, high = torch.minimum(low, high), torch.maximum(low, high)
    return torch.cat([(low + high) / 2, (high - low).clamp(min=0)], dim=-1)


def noise_labels(
    labels: Tensor, ratio: float, num_classes: int, choices: Sequence[int] | None = None
) -> Tensor:
    """Replace each label, with probability `ratio`, by one drawn uniformly (perhaps the same).

    Args:
        labels: integers in 0..num_classes-1, any shape.
        ratio: gamma of the paper, 0.2.
        num_classes: number of classes C.
        choices: classes to draw from; None for all C, as published. With COCO's 91 category ids
            that includes the 11 ids that no object has: name the used ones here to leave them out.

    Returns:
        Tensor of the shape of `labels`.
    """
    replaced = torch.rand(labels.shape, device=labels.device) < ratio
    drawn = torch.randint_like(labels, num_classes if choices is None else len(choices))
    if choices is not None:
        drawn = torch.tensor(choices).to(labels.device, non_blocking=True)[drawn]
    return torch.where(replaced, drawn, labels)
