"""Multi-scale deformable attention as a layer (Deformable DETR, Zhu et al., ICLR 2021).

Shape letters: B batch, Q queries, S tokens of all levels, D channels, H heads, L levels, N sampling
points of all levels.
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dn_detr.layers.deformable.function import check_shapes, multi_scale_deformable_attention


class MultiScaleDeformableAttention(nn.Module):
    """Every query looks at a few points of every level, at places and with weights of its own.

    1. The query predicts offsets from its reference point, and a softmax over all points.
    2. Projected tokens are sampled there, bilinearly, in each head, and summed by weight.
    3. A projection mixes the heads.

    Encoders use it as self-attention (queries are the tokens), decoders as cross-attention; all
    layers of a decoder can share one product for their values (`project_values`). It starts as
    published: looking in H directions, 1, 2, ... pixels far, with equal weights.

    Args:
        embed_dim: D.
        num_heads: H.
        num_levels: L.
        num_points: in each level; a number for each level as in D-FINE, or one for all.
        projections: whether values and the output are projected. D-FINE (Peng et al., ICLR 2025)
            has neither.

    Raises:
        ValueError: an argument does not fit; the text begins with its name.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        projections: bool = True,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"num_heads: it must divide embed_dim, got {num_heads} heads for {embed_dim}"
            )
        points = (
            (num_points,) * num_levels if isinstance(num_points, Integral) else tuple(num_points)
        )
        if len(points) != num_levels or min(points, default=0) < 0 or sum(points) < 1:
            raise ValueError(
                f"num_points: one number, or one for each of {num_levels} levels, and some point "
                f"at all is needed, got {num_points!r}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.points_per_level = points
        self.value = nn.Linear(embed_dim, embed_dim) if projections else None
        self.offsets = nn.Linear(embed_dim, num_heads * sum(points) * 2)
        self.weights = nn.Linear(embed_dim, num_heads * sum(points))
        self.output = nn.Linear(embed_dim, embed_dim) if projections else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published start; to be called again where a model initialises all its matrices.

        Head k looks along the angle 2 pi k / H, scaled to the unit square, point p of a level
        (from 1) p pixels far.
        """
        for module in (self.offsets, self.weights):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)  # [H, 2]
        directions /= directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.cat([torch.arange(1, points + 1) for points in self.points_per_level])
        with torch.no_grad():
            self.offsets.bias.copy_((directions[:, None] * steps[:, None]).flatten())
        for module in filter(None, (self.value, self.output)):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, points_per_level={self.points_per_level}"

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        shapes: Sequence[tuple[int, int]],
        reference_points: Tensor,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query: [B, Q, D], content and position.
            value: [B, S, D] tokens, level after level; or [B, S, H, D / H], this layer's part of
                `project_values`.
            shapes: (h, w) of every level, integers.
            reference_points: [B, Q, L, 2], (x, y) in 0..1 of every level, offsets being in its
                pixels; or [B, Q, L, 4], boxes cxcywh, an offset of n being half a side where the
                level has n points. [B, Q, 1, 2 or 4]: the same for all levels. Keep them in
                float32.
            padding_mask: [B, S] bool, True on padding, whose values are zero then; for tokens only.

        Returns:
            [B, Q, D]

        Raises:
            TypeError, ValueError: an argument does not fit; the text begins with its name.
        """
        if value.dim() == 3:
            (value,) = project_values(value, [self], padding_mask)
        elif padding_mask is not None:
            raise ValueError("padding_mask: give it to project_values, which made this value")
        self._check(query, value, shapes, reference_points)
        heads = (self.num_heads, sum(self.points_per_level))
        weights = self.weights(query).unflatten(-1, heads)
        # Autocast leaves low precision here, which would misplace points by up to a pixel.
        dtype = torch.promote_types(weights.dtype, torch.float32)
        locations = self._locations(
            self.offsets(query).unflatten(-1, (*heads, 2)).to(dtype),
            shapes,
            reference_points.to(dtype),
        )
        weights = weights.softmax(-1, dtype=dtype)
        output = multi_scale_deformable_attention(
            value, shapes, locations, weights, self.points_per_level
        )
        return output if self.output is None else self.output(output)

    def _check(
        self,
        query: Tensor,
        value: Tensor,
        shapes: Sequence[tuple[int, int]],
        reference_points: Tensor,
    ) -> None:
        if query.dim() != 3 or query.shape[-1] != self.embed_dim:
            raise ValueError(f"query: [B, Q, {self.embed_dim}] is needed, got {list(query.shape)}")
        width = self.embed_dim // self.num_heads
        if value.dim() != 4 or value.shape[2:] != (self.num_heads, width):
            raise ValueError(
                f"value: [B, S, {self.embed_dim}], or projected [B, S, {self.num_heads}, {width}] "
                f"is needed, got {list(value.shape)}"
            )
        check_shapes(shapes, value)
        levels = len(self.points_per_level)
        if len(shapes) != levels:
            raise ValueError(f"shapes: {levels} levels are needed, got {len(shapes)}")
        batch, queries = query.shape[:2]
        if value.shape[0] != batch:
            raise ValueError(f"value: batch {batch} is needed as of query, got {value.shape[0]}")
        size = tuple(reference_points.shape)
        if size[:2] != (batch, queries) or size[2:] not in {
            (number, coordinates) for number in (1, levels) for coordinates in (2, 4)
        }:
            raise ValueError(
                f"reference_points: [{batch}, {queries}, {levels} or 1, 2 or 4] is needed beside "
                f"this query, got {list(size)}"
            )

    def _locations(
        self, offsets: Tensor, shapes: Sequence[tuple[int, int]], reference_points: Tensor
    ) -> Tensor:
        """[B, Q, H, N, 2] offsets -> where they point to, in 0..1 of each level."""
        if reference_points.shape[2] > 1:
            levels = zip(reference_points.unbind(2), self.points_per_level)
            reference_points = torch.cat(
                [level[:, :, None].expand(-1, -1, number, -1) for level, number in levels], dim=2
            )
        reference_points = reference_points[:, :, None]  # [B, Q, 1, N or 1, 2 or 4]
        if reference_points.shape[-1] == 4:
            centre, sides = reference_points.split(2, dim=-1)
            scale = 0.5 * sides / self._per_point(self.points_per_level, offsets)[:, None]
        else:
            centre = reference_points
            heights, widths = zip(*shapes)
            scale = 1 / torch.stack([self._per_point(x, offsets) for x in (widths, heights)], -1)
        return torch.addcmul(centre, offsets, scale)

    def _per_point(self, numbers: Iterable[int], like: Tensor) -> Tensor:
        """One number for every level -> [N]. Filled on the device, which a copy would halt."""
        levels = zip(self.points_per_level, numbers)
        return torch.cat([like.new_full((points,), number) for points, number in levels])


def project_values(
    tokens: Tensor,
    layers: Sequence[MultiScaleDeformableAttention],
    padding_mask: Tensor | None = None,
) -> list[Tensor]:
    """The values of several layers that attend to the same tokens, as one matrix product.

    Each layer keeps its own projection, `value`, as published checkpoints have it.

    Args:
        tokens: [B, S, D].
        layers: all with projections, or all without.
        padding_mask: [B, S] bool, True on padding, whose values become zero.

    Returns:
        for every layer [B, S, H, D / H], a strided view that the operation reads where it is.

    Raises:
        TypeError, ValueError: an argument does not fit; the text begins with its name.
    """
    if not layers:
        raise ValueError("layers: at least one is needed")
    for layer in layers:
        if tokens.dim() != 3 or tokens.shape[-1] != layer.embed_dim:
            wanted = f"[B, S, {layer.embed_dim}]"
            raise ValueError(f"value: {wanted} is needed, got {list(tokens.shape)}")
    if padding_mask is not None:
        _check_mask(padding_mask, tokens)
    projections = [layer.value for layer in layers]
    if None in projections:
        if any(projections):
            raise ValueError("layers: all must project their values, or none")
        if padding_mask is not None:
            tokens = tokens.masked_fill(padding_mask[..., None], 0)
        values = [tokens] * len(layers)
    else:
        values = _project(tokens, projections, padding_mask)
    return [value.unflatten(-1, (layer.num_heads, -1)) for value, layer in zip(values, layers)]


def _project(
    tokens: Tensor, projections: Sequence[nn.Linear], padding_mask: Tensor | None
) -> Sequence[Tensor]:
    """[B, S, D] for every projection."""
    if len(projections) == 1:
        values = projections[0](tokens)
    else:
        weight = torch.cat([projection.weight for projection in projections])
        bias = torch.cat([projection.bias for projection in projections])
        values = linear(tokens, weight, bias)
    if padding_mask is not None:
        values.masked_fill_(padding_mask[..., None], 0)
    if len(projections) == 1:
        return [values]
    return values.unflatten(-1, (len(projections), -1)).unbind(2)  # its backward is one stack


def _check_mask(padding_mask: Tensor, tokens: Tensor) -> None:
    if padding_mask.dtype != torch.bool:
        raise TypeError(f"padding_mask: bool is needed, got {padding_mask.dtype}")
    if padding_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"padding_mask: {list(tokens.shape[:2])} is needed, got {list(padding_mask.shape)}"
        )
