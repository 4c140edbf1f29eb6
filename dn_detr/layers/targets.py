"""Ground truth of a batch, padded once, so that nothing behind it loops over images or boxes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Targets:
    """Padded ground truth of B images; M is the largest number of objects in one (may be 0).

    Attributes:
        labels: [B, M] int64 class indices; 0 where there is no object.
        boxes: [B, M, 4] cxcywh in 0..1 of the *unpadded* image; 0 where there is no object.
        valid: [B, M] bool, True where there is an object.
        counts: number of objects of each image, on the host: nobody needs to ask the device for it.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    counts: tuple[int, ...]

    @classmethod
    def pad(cls, labels: Sequence[Tensor], boxes: Sequence[Tensor]) -> "Targets":
        """Pad the per-image `labels` ([m_i]) and `boxes` ([m_i, 4], cxcywh in 0..1).

        Give CPU tensors and move the result with `to`: then padding costs the accelerator nothing.

        Raises:
            ValueError: no image, or an image whose labels and boxes differ in number.
        """
        if len(labels) == 0 or len(labels) != len(boxes):
            raise ValueError(
                f"Targets.pad needs labels and boxes of the same, non-zero number of images, "
                f"got {len(labels)} and {len(boxes)}"
            )
        for image, (label, box) in enumerate(zip(labels, boxes)):
            if box.shape != (len(label), 4):
                raise ValueError(
                    f"image {image}: boxes must have shape ({len(label)}, 4) to go with "
                    f"{len(label)} labels, got {tuple(box.shape)}"
                )
        counts = tuple(len(label) for label in labels)
        slots = torch.arange(max(counts), device=labels[0].device)
        return cls(
            labels=pad_sequence([label.long() for label in labels], batch_first=True),
            boxes=pad_sequence(list(boxes), batch_first=True),
            valid=slots[None] < torch.tensor(counts, device=slots.device)[:, None],
            counts=counts,
        )

    @property
    def width(self) -> int:
        """M, the number of columns."""
        return self.labels.shape[1]

    def to(self, device: torch.device) -> "Targets":
        """The same targets on `device`."""
        move = {name: getattr(self, name) for name in ("labels", "boxes", "valid")}
        return Targets(
            **{name: value.to(device, non_blocking=True) for name, value in move.items()},
            counts=self.counts,
        )
