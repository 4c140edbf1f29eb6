"""Multi-scale deformable attention in plain PyTorch: fallback of the kernels and their referee.

Shape letters: B batch, S tokens of all levels, H heads, D channels of a head, Q queries, N sampling
points of all levels, P those of one level.

All functions take `value` [B, S, H, D], `shapes` ((h, w) of every level), `points_per_level`,
`locations` [B, Q, H, N, 2] and `weights` [B, Q, H, N], and compute in the dtype of `locations`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

Shapes = Sequence[tuple[int, int]]


def by_sampling(
    value: Tensor,
    shapes: Shapes,
    points_per_level: Sequence[int],
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """One `grid_sample` a level, as in Deformable DETR's `ms_deform_attn_core_pytorch`.

    Returns:
        [B, Q, H * D] in the dtype of `value`.
    """
    levels = _levels(value, shapes, points_per_level, locations)
    sampled = torch.cat([_sample(maps, grid) for maps, grid in levels], dim=-1)
    output = (sampled * _head_major(weights, locations)[:, None]).sum(-1)  # [B * H, D, Q]
    return _token_major(output, value).to(value.dtype)


def by_sampling_backward(
    gradient: Tensor,
    value: Tensor,
    shapes: Shapes,
    points_per_level: Sequence[int],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `by_sampling`, for where autograd cannot be asked: inside of an operator.

    Args:
        gradient: [B, Q, H * D], of the output.

    Returns:
        Gradients of `value`, `locations` and `weights`.
    """
    heads, dim = value.shape[2:]
    gradient = gradient.to(locations.dtype).unflatten(-1, (heads, dim))
    gradient = gradient.permute(0, 2, 3, 1).flatten(0, 1)[..., None]  # [B * H, D, Q, 1]
    by_level = _head_major(weights, locations).split(list(points_per_level), dim=-1)
    d_value, d_locations, d_weights = [], [], []
    for (maps, grid), level_weights in zip(
        _levels(value, shapes, points_per_level, locations), by_level
    ):
        d_weights.append((gradient * _sample(maps, grid)).sum(1))
        d_maps, d_grid = torch.ops.aten.grid_sampler_2d_backward(
            gradient * level_weights[:, None], maps, grid, 0, 0, False, [True, True]
        )  # 0, 0, False: bilinear, zeros, align_corners=False
        d_value.append(d_maps.flatten(2))
        d_locations.append(2 * d_grid)  # grid = 2 * location - 1
    d_value = torch.cat(d_value, -1).unflatten(0, (-1, heads)).permute(0, 3, 1, 2)
    d_locations, d_weights = (
        torch.cat(levels, 2).unflatten(0, (-1, heads)).transpose(1, 2).contiguous()
        for levels in (d_locations, d_weights)
    )
    return d_value.to(value.dtype).contiguous(), d_locations, d_weights.to(weights.dtype)


def by_gathering(
    value: Tensor,
    shapes: Shapes,
    points_per_level: Sequence[int],
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """The four pixels around each point, gathered and weighed one by one.

    Takes more memory than `by_sampling`, but can be differentiated any number of times, which
    `grid_sample` cannot.

    Returns:
        [B, Q, H * D] in the dtype of `value`.
    """
    tokens = value.to(locations.dtype).transpose(1, 2)  # [B, H, S, D]
    weights = weights.to(locations.dtype).transpose(1, 2)  # [B, H, Q, N]
    points = zip(
        _bounded(locations).transpose(1, 2).split(list(points_per_level), dim=3),
        weights.split(list(points_per_level), dim=3),
    )
    output = torch.zeros_like(value[:, :1, :, :1], dtype=locations.dtype).transpose(1, 2)
    first = 0
    for (height, width), (level_locations, level_weights) in zip(shapes, points):
        level = tokens[:, :, first : first + height * width]
        for index, share, inside in _corners(height, width, level_locations):
            rows = index.flatten(2)[..., None].expand(-1, -1, -1, level.shape[-1])
            pixels = level.gather(2, rows).unflatten(2, index.shape[2:])  # [B, H, Q, P, D]
            pixels = torch.where(inside[..., None], pixels, 0)
            output = output + (pixels * (share * level_weights)[..., None]).sum(3)
        first += height * width
    return output.transpose(1, 2).flatten(2).to(value.dtype)


def _corners(height: int, width: int, locations: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each pixel around the points: its index in the level, its share, whether it exists."""
    size = locations.new_tensor([width, height])
    position = locations * size - 0.5
    first = position.detach().floor()
    fraction = position - first
    for offset in ((0, 0), (1, 0), (0, 1), (1, 1)):
        corner = first + first.new_tensor(offset)
        inside = ((corner >= 0) & (corner < size) | corner.isnan()).all(-1)
        x, y = corner.nan_to_num().clamp(min=torch.zeros_like(size), max=size - 1).long().unbind(-1)
        share = torch.stack(
            [part if far else 1 - part for part, far in zip(fraction.unbind(-1), offset)]
        ).prod(0)
        yield y * width + x, torch.where(inside, share, 0), inside


def _levels(
    value: Tensor, shapes: Shapes, points_per_level: Sequence[int], locations: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every level, what `grid_sample` takes: maps [B * H, D, h, w] and grid [B * H, Q, P, 2]."""
    maps = value.to(locations.dtype).permute(0, 2, 3, 1).flatten(0, 1)  # [B * H, D, S]
    grids = (2 * _bounded(locations) - 1).transpose(1, 2).flatten(0, 1)  # [B * H, Q, N, 2]
    sizes = [height * width for height, width in shapes]
    split = zip(maps.split(sizes, dim=-1), shapes, grids.split(list(points_per_level), dim=2))
    return ((level.unflatten(-1, shape), grid) for level, shape, grid in split)


def _bounded(locations: Tensor) -> Tensor:
    """Far points count nothing wherever they are; bounds keep them within the range of integers.

    Unlike `clamp`, this passes gradients through NaN.
    """
    return torch.where((locations < -1) | (locations > 2), 2, locations)


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    """[B * H, D, h, w] at [B * H, Q, P, 2] -> [B * H, D, Q, P]"""
    return grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _head_major(weights: Tensor, like: Tensor) -> Tensor:
    """[B, Q, H, N] -> [B * H, Q, N]"""
    return weights.to(like.dtype).transpose(1, 2).flatten(0, 1)


def _token_major(output: Tensor, value: Tensor) -> Tensor:
    """[B * H, D, Q] -> [B, Q, H * D]"""
    return output.unflatten(0, (-1, value.shape[2])).flatten(1, 2).transpose(1, 2).contiguous()
