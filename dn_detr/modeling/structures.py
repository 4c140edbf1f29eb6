"""What travels between the parts of a detector, with its shapes.

Shape letters: B images, S tokens, Q queries, L decoder layers, D channels, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """A batch of feature maps as one flat sequence.

    Attributes:
        features: [B, S, D].
        position: [B, S, D] position codes.
        padding_mask: [B, S] bool, True on padding; None where no image is padded, so that attention
            needs no mask.
        shapes: (height, width) of every level; their products add up to S.
    """

    features: Tensor
    position: Tensor
    padding_mask: Tensor | None
    shapes: tuple[tuple[int, int], ...]

    @property
    def allowed(self) -> Tensor | None:
        """[B, 1, 1, S] bool, True on image, for attention; None without padding."""
        return None if self.padding_mask is None else ~self.padding_mask[:, None, None]

    @property
    def level_sizes(self) -> list[int]:
        """Number of tokens of every level, S in all."""
        return [height * width for height, width in self.shapes]

    @property
    def valid_ratios(self) -> Tensor | None:
        """[B, levels, 2] share of each level's width and height that is image, float32.

        None without padding, where all are 1.
        """
        if self.padding_mask is None:
            return None
        levels = zip((~self.padding_mask).split(self.level_sizes, dim=1), self.shapes)
        maps = [valid.unflatten(1, shape) for valid, shape in levels]
        # Padding is at the right and the bottom: the first row and column tell.
        sides = [(valid[:, 0].sum(1), valid[:, :, 0].sum(1)) for valid in maps]
        return torch.stack(
            [torch.stack([w / x.shape[2], h / x.shape[1]], -1) for (w, h), x in zip(sides, maps)], 1
        )

    @property
    def centers(self) -> Tensor:
        """[B, S, 2] centre (x, y) of every token in 0..1 of the *unpadded* image, float32.

        Beyond 1 on padding.
        """
        levels, device = [], self.features.device
        for height, width in self.shapes:
            y = (torch.arange(height, device=device) + 0.5) / height
            x = (torch.arange(width, device=device) + 0.5) / width
            grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
            levels.append(grid.flatten(0, 1).expand(len(self.features), -1, -1))
        ratios = self.valid_ratios
        if ratios is not None:
            levels = [level / ratio for level, ratio in zip(levels, ratios.split(1, dim=1))]
        return torch.cat(levels, dim=1)


@dataclass(frozen=True)
class Queries:
    """What the decoder starts from; denoising slots, if any, come first.

    Attributes:
        content: [B, Q, D].
        anchors: [B, Q, 4] cxcywh in 0..1 of the unpadded image.
        attention_mask: bool, [Q, Q] or [B, Q, Q], True where a query (row) must not see a key;
            None: all see all.
        proposals: what the encoder predicts (two-stage models), for its losses: the `encoder` of
            `Predictions`.
    """

    content: Tensor
    anchors: Tensor
    attention_mask: Tensor | None = None
    proposals: "Predictions | None" = None

    @property
    def allowed(self) -> Tensor | None:
        """[.., 1, Q, Q] bool for attention, True where a query (row) may see a key."""
        return None if self.attention_mask is None else ~self.attention_mask.unsqueeze(-3)


@dataclass(frozen=True)
class Predictions:
    """Outputs of all decoder layers, the last layer last.

    Attributes:
        logits: [L, B, Q, C], before the sigmoid.
        boxes: [L, B, Q, 4] cxcywh in 0..1 of the unpadded image.
        encoder: predictions of K encoder tokens (two-stage models), [1, B, K, ..]: of the selected
            ones (DINO) or of all. One logit is objectness: for it every object is of class 0.
    """

    logits: Tensor
    boxes: Tensor
    encoder: "Predictions | None" = None
