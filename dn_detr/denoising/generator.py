"""Denoising training of DN-DETR: from ground truth to noised queries.

Li et al., CVPR 2022, arXiv 2203.01305.
"""

from collections.abc import Sequence

import torch

from dn_detr.denoising.noise import noise_boxes, noise_labels
from dn_detr.denoising.noised_targets import NoisedTargets
from dn_detr.layers import Targets


class DenoisingGenerator:
    """Makes groups of noised ground truth.

    1. Copy the ground truth of every image G times: the groups.
    2. Replace some labels, shift and scale all boxes.
    3. The decoder gets them in front of its matching queries, under a mask that keeps groups apart,
       and has to reconstruct the clean boxes and labels: which query answers for which object is
       known in advance.

    It knows nothing of any model, waits for no device and loops over neither images nor boxes.

    Args:
        num_classes: C. Noised labels are in 0..C-1.
        groups: G, the number of noised copies (paper: 5; 10 for the encoder-only deformable model).
        budget: instead of a fixed G, about this many slots an image: G = max(budget // M, 1), where
            M is the largest number of objects in an image of the batch (DINO, Mask DINO: 100).
            Bounds the cost of crowds.
        label_noise: probability that a label is replaced (paper: 0.2).
        center_noise, size_noise: see `noise_boxes` (paper: 0.4 each, one flag in the published
            code).
        label_choices: see `noise_labels`.
        mask_unused: see `NoisedTargets`. False is the published behaviour.

    Raises:
        ValueError: a number out of its range.

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
        groups: int = 5,
        budget: int | None = None,
        label_noise: float = 0.2,
        center_noise: float = 0.4,
        size_noise: float = 0.4,
        label_choices: Sequence[int] | None = None,
        mask_unused: bool = True,
    ):
        for name, value, low, high in (
            ("num_classes", num_classes, 1, float("inf")),
            ("groups", groups, 1, float("inf")),
            ("budget", 1 if budget is None else budget, 1, float("inf")),
            ("label_noise", label_noise, 0, 1),
            ("center_noise", center_noise, 0, float("inf")),
            ("size_noise", size_noise, 0, 1),
        ):
            if not low <= value <= high:
                raise ValueError(f"denoising: {name} must be in {low}..{high}, got {value}")
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

    def num_groups(self, width: int) -> int:
        """G for batches whose fullest image has `width` objects."""
        return self.groups if self.budget is None else max(self.budget // max(width, 1), 1)

    @torch.no_grad()
    def __call__(self, targets: Targets) -> NoisedTargets:
        """Noise `targets`, on their device. Without any object the result has 0 slots."""
        groups = self.num_groups(targets.width)
        return NoisedTargets(
            labels=noise_labels(
                targets.labels.repeat(1, groups),
                self.label_noise,
                self.num_classes,
                self.label_choices,
            ),
            boxes=noise_boxes(
                targets.boxes.repeat(1, groups, 1), self.center_noise, self.size_noise
            ),
            valid=targets.valid.repeat(1, groups),
            counts=targets.counts,
            groups=groups,
            mask_unused=self.mask_unused,
        )
