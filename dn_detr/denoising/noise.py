"""The two kinds of noise of DN-DETR (Li et al., CVPR 2022, sec. 4.2), functions of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
