"""Set criterion: the losses of matched queries and, by the same code, of all other parts."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import box_convert, sigmoid_focal_loss

from dn_detr.denoising import NoisedTargets
from dn_detr.layers import Assignment, Targets, generalized_box_iou
from dn_detr.modeling.matcher import HungarianMatcher
from dn_detr.modeling.structures import Predictions

NORMALIZERS = ("local", "global")


class SetCriterion(nn.Module):
    """Losses of all decoder layers, of the denoising part and of the encoder.

    1. Match the matching part and the encoder's tokens to the ground truth; the denoising part
       knows its assignment.
    2. For each part and every layer: sigmoid focal loss over all queries and classes, L1 and GIoU
       loss over assigned pairs, each a sum divided by a number of boxes.
    3. Weight them.

    Args:
        matcher: (predictions, targets) -> (assignment, that of the encoder or None).
        ce_weight, bbox_weight, giou_weight: loss weights (published: 1, 5, 2), in all parts.
        enc_weight: factor on the encoder's losses (published: 1).
        focal_alpha, focal_gamma: of the focal loss.
        dn_normalizer: what the denoising part is divided by. "local" (DN-DETR): the number of
            noised boxes of this process, so that a process with few objects counts as much as one
            with many. "global" (DINO): the matching part's number of boxes times the groups, so
            that all groups together give a box the weight that matching gives it. Where a budget
            leaves objects out, "local" counts only those that are noised; under "global" a noised
            box keeps its weight, and the denoising loss shrinks with their share.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        ce_weight: float = 1.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        enc_weight: float = 1.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        dn_normalizer: str = "global",
    ):
        super().__init__()
        if dn_normalizer not in NORMALIZERS:
            raise ValueError(
                f"criterion: dn_normalizer must be one of {NORMALIZERS}, got {dn_normalizer!r}"
            )
        self.matcher = matcher
        self.weights = {"loss_ce": ce_weight, "loss_bbox": bbox_weight, "loss_giou": giou_weight}
        self.enc_weight = enc_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.dn_normalizer = dn_normalizer

    def forward(
        self,
        matching: Predictions,
        targets: Targets,
        denoising: Predictions | None = None,
        noised: NoisedTargets | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses.

        Args:
            matching: the matching part of the predictions, with the encoder's in two-stage models.
            targets: ground truth.
            denoising, noised: the denoising part and what it was made of; None without denoising.

        Returns:
            ``loss_ce``, ``loss_bbox``, ``loss_giou`` of the last layer, with suffix ``_i`` of layer
            i; the denoising part with prefix ``dn_``, the encoder with ``enc_``. The names are the
            same for every batch.
        """
        num_boxes = world_mean(float(sum(targets.counts)), matching.boxes.device).clamp(min=1)
        matched, encoder_matched = self.matcher(matching, targets)
        losses = self.part_losses(matching, targets, matched, num_boxes)
        if encoder_matched is not None:
            encoder = matching.encoder
            by_name = self.part_losses(
                encoder, encoder_targets(encoder, targets), encoder_matched, num_boxes
            )
            losses |= {f"enc_{name}": self.enc_weight * loss for name, loss in by_name.items()}
        if noised is not None:
            local = max(float(sum(noised.counts)), 1.0)
            mean = num_boxes if self.dn_normalizer == "global" else local
            by_name = self.part_losses(
                denoising, targets, noised.assignment(), mean * noised.groups, noised.classified
            )
            losses |= {f"dn_{name}": loss for name, loss in by_name.items()}
        return losses

    def part_losses(
        self,
        predictions: Predictions,
        targets: Targets,
        assignment: Assignment,
        num_boxes: Tensor | float,
        classified: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of one part, by name and layer.

        Args:
            predictions: [L, B, Q, ..].
            assignment: who answers for what.
            num_boxes: all sums are divided by it.
            classified: [B, Q] bool, queries that the class loss counts; None for all.
        """
        sums = {
            "loss_ce": self._class_loss(predictions.logits, targets, assignment, classified),
            **self._box_losses(predictions.boxes, targets, assignment),
        }
        last = len(predictions.logits) - 1
        return {
            name if layer == last else f"{name}_{layer}": self.weights[name] * loss
            for name, by_layer in sums.items()
            for layer, loss in enumerate(by_layer / num_boxes)
        }

    def _class_loss(
        self, logits: Tensor, targets: Targets, assignment: Assignment, classified: Tensor | None
    ) -> Tensor:
        """Sum of the focal loss over images, queries and classes: [L]"""
        num_layers, batch_size, num_queries, num_classes = logits.shape
        labels = targets.labels.expand(num_layers, -1, -1)
        rows = assignment.rows.expand(num_layers, -1, -1)
        # One query and one class more than there are: pairs that only fill up write there.
        wanted = labels.new_full((num_layers, batch_size, num_queries + 1), num_classes)
        slots = assignment.slots.where(assignment.valid, num_queries).expand_as(rows)
        wanted.scatter_(2, slots, labels.gather(2, rows))
        one_hot = wanted[..., :num_queries, None] == torch.arange(num_classes, device=logits.device)
        loss = sigmoid_focal_loss(
            logits.float(), one_hot.float(), alpha=self.focal_alpha, gamma=self.focal_gamma
        )
        if classified is not None:
            loss = loss.where(classified[..., None], 0)
        return loss.sum(dim=(1, 2, 3))

    def _box_losses(
        self, boxes: Tensor, targets: Targets, assignment: Assignment
    ) -> dict[str, Tensor]:
        """Sums of the L1 and the GIoU loss over assigned pairs: [L] each"""
        num_layers = len(boxes)
        slots = assignment.slots.expand(num_layers, -1, -1)[..., None].expand(-1, -1, -1, 4)
        rows = assignment.rows.expand(num_layers, -1, -1)[..., None].expand(-1, -1, -1, 4)
        predicted = boxes.float().gather(2, slots)
        wanted = targets.boxes.float().expand(num_layers, -1, -1, -1).gather(2, rows)
        distance = (predicted - wanted).abs().sum(-1)
        giou = generalized_box_iou(
            box_convert(predicted, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy")
        )
        return {
            "loss_bbox": distance.where(assignment.valid, 0).sum(dim=(1, 2)),
            "loss_giou": (1 - giou).where(assignment.valid, 0).sum(dim=(1, 2)),
        }


def encoder_targets(encoder: Predictions, targets: Targets) -> Targets:
    """`targets`, all of class 0 where the encoder has one logit, objectness."""
    if encoder.logits.shape[-1] > 1:
        return targets
    return replace(targets, labels=torch.zeros_like(targets.labels))


def world_mean(value: float, device: torch.device) -> Tensor:
    """Mean of `value` over all processes, as a scalar tensor on `device`."""
    mean = torch.tensor(value).to(device, non_blocking=True)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    return mean
