"""Denoising of bounded size: fewer groups for crowded images, then fewer of their objects."""

import torch
from torch import Tensor

from dn_detr.layers import Targets


def groups_within(budget: int | None, groups: int | None, num_targets: int) -> int:
    """G, the number of groups of `num_targets` targets each.

    As many as the budget has room for, at most `groups`, at least one.

    Args:
        budget: most noised targets of an image in all groups; None: no bound.
        groups: most groups; None: no bound. Not both None.
        num_targets: M, of the image of the batch that has most.
    """
    if budget is None:
        return groups
    room = max(budget // max(num_targets, 1), 1)
    return room if groups is None else min(groups, room)


def draw_targets(targets: Targets, most: int) -> tuple[Targets, Tensor]:
    """Leave out objects of images that have more than `most`, each of them as likely.

    Nothing waits for the accelerator: counts are known, and which objects stay is a matter of
    sorting random numbers.

    Returns:
        targets with at most `most` objects an image, in their old order; and the row [B, most] in
        `targets` that each of them comes from.
    """
    keys = torch.rand(targets.valid.shape, device=targets.valid.device)
    drawn = keys.where(targets.valid, 2.0).argsort(dim=1)[:, :most]  # empty rows come last
    rows = drawn.sort(dim=1).values
    return Targets(
        labels=targets.labels.gather(1, rows),
        boxes=targets.boxes.gather(1, rows[..., None].expand(-1, -1, 4)),
        valid=targets.valid.gather(1, rows),
        counts=tuple(min(count, most) for count in targets.counts),
    ), rows
