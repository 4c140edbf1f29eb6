"""Hungarian matching (DETR, Carion et al., ECCV 2020) of all decoder layers and images at once."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from dn_detr.layers import Assignment, Targets, generalized_box_iou
from dn_detr.modeling.structures import Predictions


class HungarianMatcher:
    """One-to-one assignment of queries to objects at the lowest cost.

    1. Cost of a pair: ``class_cost * focal + bbox_cost * L1 + giou_cost * (-GIoU)``, for all layers
       and images.
    2. One hand-over of all costs to the CPU, the only place where training waits for the
       accelerator.
    3. SciPy's solver on each layer and image.

    Args:
        class_cost, bbox_cost, giou_cost: weights of the terms (published: 2, 5, 2; the class *loss*
            has weight 1).
        focal_alpha, focal_gamma: of the class cost.
    """

    def __init__(
        self,
        class_cost: float = 2.0,
        bbox_cost: float = 5.0,
        giou_cost: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
    ):
        self.class_cost = class_cost
        self.bbox_cost = bbox_cost
        self.giou_cost = giou_cost
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: Targets) -> Assignment:
        """
        Args:
            predictions: L layers, B images, Q queries.
            targets: M padded targets an image. Where an image has more objects than queries, some
                stay without.

        Returns:
            Assignment with K = min(M, Q) pairs, on the device of the predictions.

        Raises:
            ValueError: a cost that is not finite, naming layer and image.
        """
        cost = self.cost(predictions, targets)
        num_layers, batch_size, num_queries, width = cost.shape
        pairs = torch.zeros(2, num_layers, batch_size, min(num_queries, width), dtype=torch.long)
        cost = cost.cpu().numpy()
        for layer in range(num_layers):
            for image, count in enumerate(targets.counts):
                slots, rows = _solve(cost[layer, image, :, :count], layer, image)
                pairs[0, layer, image, : len(slots)] = torch.from_numpy(slots)
                pairs[1, layer, image, : len(rows)] = torch.from_numpy(rows)
        matched = torch.tensor(targets.counts).clamp(max=num_queries)
        valid = torch.arange(pairs.shape[-1]) < matched[:, None]
        device = predictions.boxes.device
        slots, rows = pairs.to(device, non_blocking=True)
        return Assignment(slots, rows, valid.to(device, non_blocking=True).expand_as(slots))

    def cost(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Cost of every pair: [L, B, Q, M], float32."""
        logits, boxes = predictions.logits.float(), predictions.boxes.float()
        num_layers, _, num_queries, _ = logits.shape
        classes = targets.labels[None, :, None].expand(num_layers, -1, num_queries, -1)
        p = logits.sigmoid().gather(-1, classes)
        # 1e-8 as in the authors' code; it would vanish in half precision.
        present = self.focal_alpha * (1 - p) ** self.focal_gamma * -(p + 1e-8).log()
        absent = (1 - self.focal_alpha) * p**self.focal_gamma * -(1 - p + 1e-8).log()
        wanted = targets.boxes.to(boxes.dtype).expand(num_layers, -1, -1, -1)
        distance = torch.cdist(boxes.flatten(0, 1), wanted.flatten(0, 1), p=1).view_as(p)
        giou = generalized_box_iou(
            box_convert(boxes, "cxcywh", "xyxy")[..., :, None, :],
            box_convert(wanted, "cxcywh", "xyxy")[..., None, :, :],
        )
        return (
            self.class_cost * (present - absent) + self.bbox_cost * distance - self.giou_cost * giou
        )


def _solve(cost, layer: int, image: int):
    """SciPy's solver on [Q, m] costs, with an error that says where."""
    try:
        return linear_sum_assignment(cost)
    except ValueError as error:
        raise ValueError(
            f"matching failed in decoder layer {layer} for image {image} of the batch: {error}. "
            "The model's outputs (or the boxes of that image) are NaN or infinite; lower the "
            "learning rate, train in float32, or check the annotations."
        ) from error
