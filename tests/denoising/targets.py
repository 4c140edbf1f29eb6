"""Ground truth for the tests of denoising."""

import torch

from dn_detr.layers import Targets

COUNTS = [(3, 5), (0, 4), (1, 0, 7), (2,), (0, 0)]


def make_targets(counts, num_classes=9, seed=0):
    """Padded targets, and the labels and boxes of every image.

    Boxes stay away from the border: no noise on corners of up to their size is clamped.
    """
    g = torch.Generator().manual_seed(seed)
    labels = [torch.randint(0, num_classes, (n,), generator=g) for n in counts]
    centers = [0.4 + 0.2 * torch.rand(n, 2, generator=g) for n in counts]
    sizes = [0.05 + 0.2 * torch.rand(n, 2, generator=g) for n in counts]
    boxes = [torch.cat(pair, dim=1) for pair in zip(centers, sizes)]
    return Targets.pad(labels, boxes), labels, boxes
