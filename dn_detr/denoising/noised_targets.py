"""Noised ground truth, and the three views of it that detectors take.

Shape letters: B images, G groups, M targets of a group, W its slots (M, contrastive 2 M), P = G * W
slots, S noised targets in all.
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
        positive: [S] bool, True: reconstruct the object; False: recognise that there is none.
    """

    labels: Tensor
    boxes: Tensor
    image: Tensor
    slot: Tensor
    row: Tensor
    positive: Tensor


@dataclass(frozen=True)
class NoisedTargets:
    """G noised copies of a batch's ground truth in block form.

    Slot g * M + m is target m in group g. Contrastive, a group has every target twice: slot
    g * 2M + m is the positive of target m and g * 2M + M + m the negative, in every image.

    - **Block form** (`labels`, `boxes`, `valid`, `attention_mask`, `split`): queries for a decoder.
    - **Assignment** (`assignment`, `classified`): slot -> ground-truth row, known in advance, for
      any set criterion.
    - **Flat form** (`flat`): one entry a noised target, for RoI heads.

    Attributes:
        labels: [B, P] int64 noised class indices; anything where `valid` is False.
        boxes: [B, P, 4] noised boxes, cxcywh in 0..1; anything where `valid` is False.
        valid: [B, P] bool, True where a slot holds a noised target, positive or negative.
        counts: number of noised targets in a group of each image, on the host.
        groups: G, at least 1.
        mask_unused: hide the slots without a target from the others of their group. The published
            code leaves them visible, so that outputs depend on the number of objects in the other
            images of the batch.
        contrastive: groups have negatives behind their positives.
        classify_unused: slots without a target are to be recognised as background, as if they were
            negatives (DINO's published code); False: no loss counts them.
        rows: [B, P] int64 ground-truth row of every slot; None: row m for target m.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    counts: tuple[int, ...]
    groups: int
    mask_unused: bool = True
    contrastive: bool = False
    classify_unused: bool = False
    rows: Tensor | None = None

    def __len__(self) -> int:
        """P, the number of slots; 0 if no image has an object."""
        return self.labels.shape[1]

    @property
    def width(self) -> int:
        """W, the slots of a group."""
        return len(self) // self.groups

    @property
    def targets_per_group(self) -> int:
        """M, the targets that a group has room for."""
        return self.width // 2 if self.contrastive else self.width

    @property
    def positive(self) -> Tensor:
        """[P] bool, True where a slot is for a positive. All there is to know of a slot's kind."""
        slots = torch.arange(len(self), device=self.labels.device)
        return slots % max(self.width, 1) < self.targets_per_group

    @property
    def classified(self) -> Tensor:
        """[B, P] bool, slots that the class loss counts.

        Background is what those of them should say that have no part in `assignment`.
        """
        return torch.ones_like(self.valid) if self.classify_unused else self.valid

    def attention_mask(self, num_matching: int) -> Tensor:
        """Self-attention mask of ``[denoising slots | matching queries]``, T = P + `num_matching`.

        Groups are blind to each other, and the matching part is blind to all of them; the denoising
        part may see the matching part. Without this mask the ground truth leaks: AP falls to 24.0
        (DN-DETR, table 5). Positives and negatives of a group see each other.

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
        """Which slot answers for which row: [1, B, G * M], the same for every decoder layer.

        Only positives answer for something.
        """
        targets = torch.arange(
            self.groups * self.targets_per_group, device=self.labels.device
        ).expand(len(self.labels), -1)
        group = targets // max(self.targets_per_group, 1)
        row = targets % max(self.targets_per_group, 1)
        slots = group * self.width + row
        rows = row if self.rows is None else self.rows.gather(1, slots)
        return Assignment(slots[None], rows[None], self.valid.gather(1, slots)[None])

    def flat(self) -> FlatTargets:
        """The noised targets without padding, in an image group by group, positives first.

        S = G * sum(counts), contrastive twice as many.
        """
        # Made on the host, where the counts are known: a boolean mask would wait for the
        # accelerator.
        starts = torch.arange(0, len(self), max(self.targets_per_group, 1))[:, None]
        per_image = [(starts + torch.arange(count)).flatten() for count in self.counts]
        image = torch.cat([torch.full_like(slot, i) for i, slot in enumerate(per_image)])
        device = self.labels.device
        image, slot = (x.to(device, non_blocking=True) for x in (image, torch.cat(per_image)))
        row = slot % max(self.targets_per_group, 1)
        return FlatTargets(
            labels=self.labels[image, slot],
            boxes=self.boxes[image, slot],
            image=image,
            slot=slot,
            row=row if self.rows is None else self.rows[image, slot],
            positive=self.positive[slot],
        )
