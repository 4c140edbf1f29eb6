"""Sine codes of positions: of feature maps and anchors (DAB-DETR, ICLR 2022, sec. 4.3)."""

import math

import torch
from torch import Tensor, nn


def sine_encode(
    values: Tensor, channels: int, temperature: float, scale: float = 2 * math.pi
) -> Tensor:
    """Code every number of `values` by `channels` sines and cosines, interleaved.

    Channel j is ``sin`` (j even) or ``cos`` (j odd) of
    ``scale * value / temperature ** (2 * (j // 2) / channels)``.

    Args:
        values: any shape, usually in 0..1.
        channels: even number of channels a value.
        temperature: ratio of the longest to the shortest period.
        scale: angle of value 1 in the first channel.

    Returns:
        Tensor ``values.shape + (channels,)``.
    """
    exponent = torch.arange(0, channels, 2, device=values.device, dtype=values.dtype) / channels
    angle = (values * scale)[..., None] / temperature**exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def encode_anchors(
    anchors: Tensor, channels: int, temperature: float = 10000, scale: float = 2 * math.pi
) -> Tensor:
    """Sine code of anchors.

    Args:
        anchors: [..., 4] cxcywh in 0..1.
        channels: even number of channels a coordinate.

    Returns:
        [..., 4 * channels] in the order y, x, w, h; the first half alone codes the centre.
    """
    x, y, w, h = anchors.unbind(-1)
    return sine_encode(torch.stack([y, x, w, h], -1), channels, temperature, scale).flatten(-2)


class SinePositionEncoding(nn.Module):
    """Sine code of the cells of a feature map, relative to the unpadded image.

    Args:
        embed_dim: channels D of the code, half of them for y, half for x.
        temperature: 20 in DAB- and DN-DETR, 10000 in DETR and the deformable models.
        scale: angle of the last valid cell in the first channel.
        offset: added to the 1-based cell index; -0.5 codes cell centres (Deformable-DETR), 0 is
            DAB-DETR's.
    """

    def __init__(
        self,
        embed_dim: int,
        temperature: float = 20,
        scale: float = 2 * math.pi,
        offset: float = 0.0,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.temperature = temperature
        self.scale = scale
        self.offset = offset

    def forward(self, padding_mask: Tensor) -> Tensor:
        """[B, h, w] bool, True on padding -> [B, h, w, D], the first half for y"""
        valid = (~padding_mask).float()
        y, x = valid.cumsum(1), valid.cumsum(2)
        y = (y + self.offset) / (y[:, -1:] + 1e-6)
        x = (x + self.offset) / (x[:, :, -1:] + 1e-6)
        code = sine_encode(
            torch.stack([y, x], -1), self.embed_dim // 2, self.temperature, self.scale
        )
        return code.flatten(-2)
