"""Noised ground truth, and the three views of it that detectors take.

Shape letters: B images, M padded targets an image, G groups, P = G * M slots, S noised targets in
all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dn_detr.denoising.mask import SHARED, group_attention_mask
from dn_detr.layers import Assignment


@dataclass(frozen=True)
class FlatTargets:
    """One entry a noised target, image by image: the form for RoI heads.

    Attributes:
        labels: [S] noised class indices.
        boxes: [S, 4] noised boxes, cxcywh in 0..1.
        image: [S] image in the batch.
        slot: [S] position in the block form.
        row: [S] ground-truth row within the image.
    """

    labels: Tensor
    boxes: Tensor
    image: Tensor
    slot: Tensor
    row: Tensor


@dataclass(frozen=True)
class NoisedTargets:
    """G noised copies of a batch's ground truth in block form; slot g * M + m: target m, group g.

    - **Block form** (`labels`, `boxes`, `valid`, `attention_mask`, `split`): queries for a decoder.
    - **Assignment** (`assignment`): slot -> ground-truth row, known in advance, for any set
      criterion.
    - **Flat form** (`flat`): one entry a noised target, for RoI heads.

    Attributes:
        labels: [B, P] int64 noised class indices; anything where `valid` is False.
        boxes: [B, P, 4] noised boxes, cxcywh in 0..1; anything where `valid` is False.
        valid: [B, P] bool, True where a slot holds a noised target.
        counts: number of targets of each image, on the host.
        groups: G, at least 1.
        mask_unused: hide the slots without a target from the others of their group. The published
            code leaves them visible, so that outputs depend on the number of objects in the other
            images of the batch.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    counts: tuple[int, ...]
    groups: int
    mask_unused: bool = True

    def __len__(self) -> int:
        """P, the number of slots; 0 if no image has an object."""
        return self.labels.shape[1]

    @property
    def width(self) -> int:
        """M, the slots of a group."""
        return len(self) // self.groups

    def attention_mask(self, num_matching: int) -> Tensor:
        """Self-attention mask of ``[denoising slots | matching queries]``, T = P + `num_matching`.

        Groups are blind to each other, and the matching part is blind to all of them; the denoising
        part may see the matching part. Without this mask the ground truth leaks: AP falls to 24.0
        (paper, table 5).

        Returns:
            bool, True where a query (row) must *not* see a key (column): [T, T], or [B, T, T] with
            `mask_unused`.
        """
        device = self.labels.device
        group = torch.arange(len(self), device=device) // max(self.width, 1)
        mask = group_attention_mask(torch.cat([group, group.new_full((num_matching,), SHARED)]))
        if not self.mask_unused:
            return mask
        unused = torch.cat(
            [~self.valid, self.valid.new_zeros(len(self.valid), num_matching)], dim=1
        )
        # An unused slot still sees itself: a row that sees nothing would turn into NaN.
        itself = torch.eye(mask.shape[0], dtype=torch.bool, device=device)
        return mask | (unused[:, None, :] & ~itself)

    def split(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """(denoising part, matching part) of what is ``[denoising | matching]`` along `dim`."""
        return x.narrow(dim, 0, len(self)), x.narrow(dim, len(self), x.shape[dim] - len(self))

    def assignment(self) -> Assignment:
        """Slot g * M + m answers for row m: [1, B, P], the same for every decoder layer."""
        slots = torch.arange(len(self), device=self.labels.device).expand_as(self.labels)
        return Assignment(slots[None], slots[None] % max(self.width, 1), self.valid[None])

    def flat(self) -> FlatTargets:
        """The noised targets without padding, S = G * sum(counts); in an image group by group."""
        per_image = [
            torch.arange(self.groups)[:, None] * self.width + torch.arange(count)
            for count in self.counts
        ]
        image = torch.cat([torch.full((s.numel(),), i) for i, s in enumerate(per_image)])
        slot = torch.cat([s.flatten() for s in per_image])
        # Made on the host, where the counts are known: a boolean mask would wait for the
        # accelerator.
        device = self.labels.device
        image, slot = image.to(device, non_blocking=True), slot.to(device, non_blocking=True)
        return FlatTargets(
            labels=self.labels[image, slot],
            boxes=self.boxes[image, slot],
            image=image,
            slot=slot,
            row=slot % max(self.width, 1),
        )
