"""Hungarian matching (DETR, Carion et al., ECCV 2020) of all layers and images at once.

Shape letters: L layers, B images, Q queries (decoder) or tokens (encoder), C classes, M padded
targets an image.
"""

import logging

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor
from torchvision.ops import box_convert

from dn_detr.layers import Assignment, Targets, generalized_box_iou
from dn_detr.modeling.structures import Predictions

logger = logging.getLogger(__name__)

# From this number of queries on, only candidates go to the host. Solving for 2 images with 30
# objects each, in ms on one CPU core, by all pairs | candidates: 0.6 | 1.2 for 900 queries, 1.3 |
# 1.4 for 2,000, 3.9 | 1.7 for 8,000, 7.8 | 2.8 for 22,000, where 5.3 MB shrink to 14 kB.
MANY_QUERIES = 2000

# Costs are computed for at most about so many pairs at a time. Intermediate results take some 60
# bytes a pair, 250 MB in all; 22,000 tokens with 500 objects in each of 2 images would take 1 GB.
MAX_PAIRS = 2**22

# A cost below all others that SciPy's sums still hold; what is not finite has it.
CHEAPEST = -1e30


class HungarianMatcher:
    """One-to-one assignment of queries to objects at the lowest cost.

    1. Cost of a pair: ``class_cost * focal + bbox_cost * L1 + giou_cost * (-GIoU)``, for all layers
       and images.
    2. One hand-over of all costs to the CPU, the only place where training waits for the
       accelerator. Of many tokens only each object's candidates go, see `candidates`.
    3. SciPy's solver on each layer and image.

    A pair whose cost is NaN or infinite counts as cheapest: it is assigned, so that the loss is not
    finite either and all processes can stop alike. A warning names layer and image, once.

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
        self._warned = False

    @torch.no_grad()
    def __call__(
        self, predictions: Predictions, targets: Targets
    ) -> tuple[Assignment, Assignment | None]:
        """
        Args:
            predictions: of the decoder's layers, and of the encoder where `encoder` is there.
            targets: where an image has more objects than queries, some stay without.

        Returns:
            Assignments of the decoder, [L, B, min(M, Q)] pairs, and of the encoder, L = 1 (None
            without its predictions), on the device of the predictions.
        """
        parts = {"decoder layer {}": predictions}
        if predictions.encoder is not None:
            parts["the encoder"] = predictions.encoder
        on_host = _hand_over([self.candidates(part, targets) for part in parts.values()])
        for where, (costs, *_) in zip(parts, on_host):
            self._settle(where, costs, targets.counts)
        decoder, *encoder = [
            _assign(part, targets.counts, *costs) for part, costs in zip(parts.values(), on_host)
        ]
        return decoder, encoder[0] if encoder else None

    def candidates(self, predictions: Predictions, targets: Targets) -> tuple[Tensor, ...]:
        """What the solver needs to know, as little as pays.

        Of many queries, each object's M cheapest are enough: the other M - 1 objects cannot take
        all of them, so whoever was given another query could swap it for one of them that is free.

        Returns:
            Costs [L, B, M, Q] of all pairs; or, from `MANY_QUERIES` on, of each object's M
            cheapest queries, [L, B, M, M], cheapest first, and these queries, int32 of that shape.
        """
        num_layers, batch_size, num_queries, _ = predictions.boxes.shape
        step = max(MAX_PAIRS // max(num_layers * batch_size * num_queries, 1), 1)
        costs = (
            self.cost(predictions, labels, boxes)
            for labels, boxes in zip(targets.labels.split(step, 1), targets.boxes.split(step, 1))
        )
        if num_queries < max(MANY_QUERIES, 2 * targets.width):
            return (torch.cat(list(costs), dim=2),)
        # What is not finite counts as cheapest here, so that it is handed over and found.
        cheapest = [
            cost.where(cost.isfinite(), -torch.inf).topk(targets.width, largest=False)
            for cost in costs
        ]
        values, queries = (torch.cat(x, dim=2) for x in zip(*cheapest))
        return values, queries.int()

    def cost(self, predictions: Predictions, labels: Tensor, boxes: Tensor) -> Tensor:
        """Cost of every pair, float32.

        Args:
            predictions: [L, B, Q, ..]. One logit is objectness, whatever the labels.
            labels: [B, M] class indices.
            boxes: [B, M, 4] cxcywh.

        Returns:
            [L, B, M, Q]
        """
        logits, predicted = predictions.logits.transpose(2, 3), predictions.boxes.float()
        num_layers, _, num_classes, num_queries = logits.shape
        if num_classes > 1:
            classes = labels[None, :, :, None].expand(num_layers, -1, -1, num_queries)
            logits = logits.gather(2, classes)
        wanted = boxes.to(predicted.dtype).expand(num_layers, -1, -1, -1)
        distance = torch.cdist(wanted.flatten(0, 1), predicted.flatten(0, 1), p=1)
        giou = generalized_box_iou(
            box_convert(wanted, "cxcywh", "xyxy")[..., :, None, :],
            box_convert(predicted, "cxcywh", "xyxy")[..., None, :, :],
        )
        return (
            self.class_cost * self._focal_cost(logits.float())
            + self.bbox_cost * distance.unflatten(0, (num_layers, -1))
            - self.giou_cost * giou
        )

    def _settle(self, where: str, costs: np.ndarray, counts: tuple[int, ...]) -> None:
        """Makes what is not finite `CHEAPEST`, in place: SciPy refuses NaN."""
        bad = ~np.isfinite(costs)
        if not bad.any():
            return
        costs[bad] = CHEAPEST
        padding = np.arange(costs.shape[2]) >= np.array(counts)[:, None]
        places = np.argwhere(bad.any(-1) & ~padding)
        if len(places) and not self._warned:
            self._warned = True
            layer, image, _ = places[0]
            logger.warning(
                f"matching: in {where.format(layer)} a cost of image {image} of the batch is NaN "
                "or infinite, and so is the loss: the model's outputs, or the boxes of that image, "
                "are not finite. A smaller optimizer.lr or train.amp.enabled=False may help. This "
                "is said once."
            )

    def _focal_cost(self, logits: Tensor) -> Tensor:
        """Focal loss of the class being present less that of its being absent."""
        p = logits.sigmoid()
        # 1e-8 as in the authors' code; it would vanish in half precision.
        present = self.focal_alpha * (1 - p) ** self.focal_gamma * -(p + 1e-8).log()
        absent = (1 - self.focal_alpha) * p**self.focal_gamma * -(1 - p + 1e-8).log()
        return present - absent


def _hand_over(groups: list[tuple[Tensor, ...]]) -> list[list[np.ndarray]]:
    """The same groups on the host, in one transfer; all of types of four bytes."""
    tensors = [x for group in groups for x in group]
    flat = torch.cat([x.flatten().view(torch.int32) for x in tensors]).cpu()
    pieces = iter(flat.split([x.numel() for x in tensors]))
    return [[next(pieces).view(x.dtype).view(x.shape).numpy() for x in group] for group in groups]


def _assign(
    predictions: Predictions,
    counts: tuple[int, ...],
    costs: np.ndarray,
    queries: np.ndarray | None = None,
) -> Assignment:
    """Solve each layer and image of `HungarianMatcher.candidates`."""
    num_layers, batch_size, width, _ = costs.shape
    num_queries, device = predictions.boxes.shape[2], predictions.boxes.device
    pairs = torch.zeros(2, num_layers, batch_size, min(num_queries, width), dtype=torch.long)
    for layer, image in np.ndindex(num_layers, batch_size):
        count = counts[image]
        cost = costs[layer, image, :count]
        if queries is not None:
            cost = cost[:, :count]
        if queries is None:
            rows, slots = linear_sum_assignment(cost)
        else:
            rows, slots = _solve_candidates(
                cost, queries[layer, image, :count, :count], num_queries
            )
        pairs[0, layer, image, : len(slots)] = torch.from_numpy(slots)
        pairs[1, layer, image, : len(rows)] = torch.from_numpy(rows)
    valid = torch.arange(pairs.shape[-1]) < torch.tensor(counts)[:, None]
    slots, rows = pairs.to(device, non_blocking=True)
    return Assignment(slots, rows, valid.to(device, non_blocking=True).expand_as(slots))


def _solve_candidates(cost: np.ndarray, queries: np.ndarray, num_queries: int):
    """`linear_sum_assignment` of m objects whose m candidates `queries` [m, m] cost `cost`."""
    count = len(cost)
    if count == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # An entry of 0 means "no candidate" to SciPy; a constant on all of them changes no optimum.
    weights = cost.astype(np.float64) - cost.min() + 1
    starts = np.arange(0, count * count + 1, count)
    graph = csr_array((weights.ravel(), queries.ravel(), starts), shape=(count, num_queries))
    rows, slots = min_weight_full_bipartite_matching(graph)
    return rows, slots.astype(np.int64)
