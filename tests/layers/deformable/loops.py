"""Multi-scale deformable attention in float64 NumPy, point after point: what kernels must compute.

Written from the equation alone; slow, and with nothing of the implementations in it.

    value      [B, S, H, D]     S = sum of height * width over the levels, level after level
    shapes     (height, width) of every level
    points     number of sampling points of every level
    locations  [B, Q, H, N, 2]  (x, y) in 0..1 of the point's level; N = sum of points
    weights    [B, Q, H, N]
    output     [B, Q, H * D]

A pixel's centre is at ((column + 0.5) / width, (row + 0.5) / height). A pixel outside of the map
does not take part, and a point more than one pixel away from the map has nothing to read. A point
with a coordinate that is NaN (and none that is outside) makes its output NaN.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Shapes = Sequence[tuple[int, int]]


class _Corner(NamedTuple):
    """One of the four pixels around a point, for every batch, query and head: [B, Q, H]."""

    inside: np.ndarray
    token: np.ndarray  # 0 where the corner is not inside
    weight: np.ndarray  # bilinear
    weight_dx: np.ndarray  # its derivatives with respect to the location's x and y
    weight_dy: np.ndarray


def _corners(
    shapes: Shapes, points: Sequence[int], locations: np.ndarray
) -> Iterator[tuple[int, np.ndarray, list[_Corner]]]:
    """For every point: its index, where a coordinate is NaN, and its four corners."""
    point = first_token = 0
    for (height, width), count in zip(shapes, points, strict=True):
        for _ in range(count):
            x = locations[..., point, 0] * width - 0.5
            y = locations[..., point, 1] * height - 0.5
            reads = ~((x < -1) | (x >= width) | (y < -1) | (y >= height))
            left, top = np.floor(x), np.floor(y)
            corners = []
            for column, across, slope_x in ((left, left + 1 - x, -1), (left + 1, x - left, 1)):
                for row, down, slope_y in ((top, top + 1 - y, -1), (top + 1, y - top, 1)):
                    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & reads
                    token = np.where(inside, first_token + row * width + column, 0).astype(int)
                    dx, dy = slope_x * down * width, across * slope_y * height
                    corners.append(_Corner(inside, token, across * down, dx, dy))
            yield point, reads & np.isnan(x + y), corners
            point += 1
        first_token += height * width
    assert point == locations.shape[-2]


def _as_float64(*arrays) -> list[np.ndarray]:
    return [np.asarray(array, dtype=np.float64) for array in arrays]


def _batch_and_head(sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    batch, _, head = np.indices(sizes, sparse=True)
    return batch, head


@np.errstate(invalid="ignore", over="ignore")
def forward(value, shapes: Shapes, points: Sequence[int], locations, weights) -> np.ndarray:
    """The output, [B, Q, H * D], in float64."""
    value, locations, weights = _as_float64(value, locations, weights)
    batch, head = _batch_and_head(weights.shape[:3])
    output = np.zeros((*weights.shape[:3], value.shape[-1]))
    for point, is_nan, corners in _corners(shapes, points, locations):
        output[is_nan] = np.nan
        for corner in corners:
            pixels = value[batch, corner.token, head]  # [B, Q, H, D]
            factor = (weights[..., point] * corner.weight)[..., None]
            output += np.where(corner.inside[..., None], factor * pixels, 0)
    return output.reshape(*output.shape[:2], output.shape[2] * output.shape[3])


@np.errstate(invalid="ignore", over="ignore")
def backward(
    gradient, value, shapes: Shapes, points: Sequence[int], locations, weights
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of value, locations and weights in float64, given that of the output.

    Where a coordinate is NaN, the gradients of its location and weight are NaN, and no gradient of
    value is added (implementations may: which pixels such a point reads is not defined).
    """
    gradient, value, locations, weights = _as_float64(gradient, value, locations, weights)
    batch, head = _batch_and_head(weights.shape[:3])
    gradient = gradient.reshape(*weights.shape[:3], value.shape[-1])
    value_gradient, location_gradient, weight_gradient = (
        np.zeros_like(array) for array in (value, locations, weights)
    )
    for point, is_nan, corners in _corners(shapes, points, locations):
        weight = weights[..., point]
        for corner in corners:
            # how much the loss changes with this corner's bilinear weight
            slope = (gradient * value[batch, corner.token, head]).sum(-1)
            slope = np.where(corner.inside, slope, 0)
            for total, factor in (
                (weight_gradient[..., point], corner.weight),
                (location_gradient[..., point, 0], weight * corner.weight_dx),
                (location_gradient[..., point, 1], weight * corner.weight_dy),
            ):
                total += np.where(corner.inside, factor * slope, 0)
            b, q, h = np.nonzero(corner.inside)
            shares = (weight * corner.weight)[b, q, h, None] * gradient[b, q, h]
            np.add.at(value_gradient, (b, corner.token[b, q, h], h), shares)
        weight_gradient[..., point][is_nan] = np.nan
        location_gradient[..., point, :][is_nan] = np.nan
    return value_gradient, location_gradient, weight_gradient
