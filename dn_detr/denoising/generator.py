"""Denoising training: from ground truth to noised queries.

DN-DETR (Li et al., CVPR 2022, arXiv 2203.01305); contrastive: DINO (Zhang et al., ICLR 2023, arXiv
2203.03605, sec. 3.3).
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dn_detr.denoising.budget import draw_targets, groups_within
from dn_detr.denoising.noise import noise_boxes, noise_corners, noise_labels
from dn_detr.denoising.noised_targets import NoisedTargets
from dn_detr.layers import Targets

logger = logging.getLogger(__name__)


class DenoisingGenerator:
    """Makes groups of noised ground truth.

    1. Copy the ground truth of every image G times: the groups. Contrastive denoising copies it
       twice for each group, to positives and negatives.
    2. Replace some labels; move the boxes, negatives further than positives.
    3. The decoder gets them in front of its matching queries, under a mask that keeps groups apart,
       and has to reconstruct the clean boxes and labels, and to reject the negatives: which query
       answers for which object is known in advance.

    It knows nothing of any model, waits for no device and loops over neither images nor boxes.

    The cost of self-attention grows with the square of G * M, where M is the largest number of
    objects in an image of the batch. `budget` bounds it: ``G = max(min(groups, budget // M), 1)``,
    and of an image with more objects than that, one group of `budget` objects is noised, drawn anew
    in every step (DINO's code noises all of them). The first time that this reduces `groups`, or
    leaves objects out, a warning says so.

    Args:
        num_classes: C. Noised labels are in 0..C-1.
        groups: G, the number of noised copies (paper: 5; 10 for the encoder-only deformable model);
            None: as many as the budget has room for.
        budget: most noised targets of an image in all groups, pairs of a positive and a negative if
            contrastive (DINO: 100, with `groups` None); None: no bound, as DN-DETR.
        label_noise: probability that a label is replaced (DN-DETR: 0.2; DINO: 0.25).
        center_noise, size_noise: see `noise_boxes` (DN-DETR: 0.4 each, one flag in the published
            code). Contrastive denoising has `corner_noise` instead.
        label_choices: see `noise_labels`.
        mask_unused, classify_unused: see `NoisedTargets`. False and True are the published
            behaviour of DINO, False and False that of DN-DETR.
        contrastive: also noise every target to a negative, which lies near the object and is to be
            recognised as background.
        corner_noise, swap_inverted: see `noise_corners`; contrastive only (DINO: 1).
        unknown_negatives: negatives get the label C, "unknown" (the DN-DETR authors' port of DINO),
            and not, as in DINO, a noised label like that of a positive; contrastive only.

    Raises:
        ValueError: a number out of its range; neither groups nor budget.

    Example:
        >>> boxes = torch.tensor([[0.5, 0.5, 0.2, 0.1]] * 2)
        >>> targets = Targets.pad([torch.tensor([1, 2])], [boxes])
        >>> noised = DenoisingGenerator(num_classes=3, groups=5)(targets)
        >>> noised.boxes.shape, noised.attention_mask(num_matching=7).shape
        (torch.Size([1, 10, 4]), torch.Size([1, 17, 17]))
    """

    def __init__(
        self,
        num_classes: int,
        groups: int | None = 5,
        budget: int | None = None,
        label_noise: float = 0.2,
        center_noise: float = 0.4,
        size_noise: float = 0.4,
        label_choices: Sequence[int] | None = None,
        mask_unused: bool = True,
        contrastive: bool = False,
        corner_noise: float = 1.0,
        swap_inverted: bool = False,
        unknown_negatives: bool = False,
        classify_unused: bool = False,
    ):
        for name, value, low, high in (
            ("num_classes", num_classes, 1, float("inf")),
            ("groups", 1 if groups is None else groups, 1, float("inf")),
            ("budget", 1 if budget is None else budget, 1, float("inf")),
            ("label_noise", label_noise, 0, 1),
            ("center_noise", center_noise, 0, float("inf")),
            ("size_noise", size_noise, 0, 1),
            ("corner_noise", corner_noise, 0, float("inf")),
        ):
            if not low <= value <= high:
                raise ValueError(f"denoising: {name} must be in {low}..{high}, got {value}")
        if groups is None and budget is None:
            raise ValueError(
                "denoising: set groups (5 in DN-DETR), budget (100 in DINO) or both; both are None"
            )
        if label_choices is not None and not all(0 <= c < num_classes for c in label_choices):
            raise ValueError(
                f"denoising: label_choices must be in 0..{num_classes - 1}, "
                f"got {list(label_choices)}"
            )
        self.num_classes = num_classes
        self.groups = groups
        self.budget = budget
        self.label_noise = label_noise
        self.center_noise = center_noise
        self.size_noise = size_noise
        self.label_choices = None if label_choices is None else tuple(label_choices)
        self.mask_unused = mask_unused
        self.contrastive = contrastive
        self.corner_noise = corner_noise
        self.swap_inverted = swap_inverted
        self.unknown_negatives = unknown_negatives
        self.classify_unused = classify_unused
        self._warned: set[str] = set()

    @torch.no_grad()
    def __call__(self, targets: Targets) -> NoisedTargets:
        """Noise `targets`, on their device. Without any object the result has 0 slots."""
        copies = self._copies(targets)
        # What a slot is for follows from its place alone, here as in the assignment: noise and
        # loss cannot disagree about which slots are negatives, whatever the batch.
        negative = ~copies.positive
        return replace(
            copies,
            labels=self._noised_labels(copies.labels, negative),
            boxes=self._noised_boxes(copies.boxes, negative),
        )

    def _copies(self, targets: Targets) -> NoisedTargets:
        """All slots, without noise yet."""
        groups = groups_within(self.budget, self.groups, targets.width)
        self._warn(targets.width, groups)
        rows = None
        if self.budget is not None and targets.width > self.budget:
            targets, rows = draw_targets(targets, self.budget)
        number = groups * (2 if self.contrastive else 1)
        return NoisedTargets(
            labels=targets.labels.repeat(1, number),
            boxes=targets.boxes.repeat(1, number, 1),
            valid=targets.valid.repeat(1, number),
            counts=targets.counts,
            groups=groups,
            mask_unused=self.mask_unused,
            contrastive=self.contrastive,
            classify_unused=self.classify_unused,
            rows=None if rows is None else rows.repeat(1, number),
        )

    def _noised_labels(self, labels: Tensor, negative: Tensor) -> Tensor:
        """labels [B, P], negative [P] -> [B, P]"""
        noised = noise_labels(labels, self.label_noise, self.num_classes, self.label_choices)
        return noised.where(~negative, self.num_classes) if self.unknown_negatives else noised

    def _noised_boxes(self, boxes: Tensor, negative: Tensor) -> Tensor:
        """boxes [B, P, 4], negative [P] -> [B, P, 4]"""
        if self.contrastive:
            return noise_corners(boxes, self.corner_noise, negative, self.swap_inverted)
        return noise_boxes(boxes, self.center_noise, self.size_noise)

    def _warn(self, num_targets: int, groups: int) -> None:
        """Say what the budget costs, once each."""
        if self.groups is not None and groups < self.groups and "groups" not in self._warned:
            self._warned.add("groups")
            logger.warning(
                f"denoising: an image has {num_targets} objects; with budget={self.budget} that "
                f"leaves {groups} of {self.groups} groups, max(min(groups, budget // objects), 1). "
                f"All groups: set model.denoising.budget={num_targets * self.groups}. This is said "
                "once."
            )
        if self.budget is not None and num_targets > self.budget and "targets" not in self._warned:
            self._warned.add("targets")
            logger.warning(
                f"denoising: an image has {num_targets} objects, more than budget={self.budget}: "
                f"{self.budget} of them are noised, drawn anew in every step. All of them: set "
                f"model.denoising.budget={num_targets}; self-attention's memory grows with its "
                "square. This is said once."
            )
