"""The public function of multi-scale deformable attention: its arguments, checked in words."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dn_detr.layers.deformable import operators, reference

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def multi_scale_deformable_attention(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points_per_level: Sequence[int] | None = None,
) -> Tensor:
    """Weighted sums of bilinear samples from several maps (Deformable DETR, Zhu et al., ICLR 2021).

    A point at (x, y) of a map of size (h, w) lies at pixel (x * w - 0.5, y * h - 0.5); pixels
    outside of the map do not take part (`grid_sample` with zeros and `align_corners=False`). Sums
    are taken in float32, for float64 in float64. Under autocast `value` is lowered, and nothing
    else. It can be differentiated any number of times, in forward mode through the reference.

    Shape letters: B batch, S tokens, H heads, D channels of a head, Q queries, L levels, P points.

    Args:
        value: [B, S, H, D], the levels' maps flattened row by row, one behind the other. float32,
            float64, float16 or bfloat16. Strided tensors (one layer's part of a larger product)
            are read where they are.
        shapes: (h, w) of every level: integers, or a sequence of them, not a tensor.
        locations: [B, Q, H, L, P, 2], (x, y) in 0..1 of the map, or beyond. float32, for float64
            values float64: lower precision would misplace points by up to a pixel.
        weights: [B, Q, H, L, P], in the dtype of `value` or float32.
        points_per_level: for levels with points of their own number. L and P are then one axis of
            all points, level by level: `locations` [B, Q, H, N, 2], `weights` [B, Q, H, N].

    Returns:
        [B, Q, H * D] in the dtype of `value`.

    Raises:
        TypeError, ValueError: an argument does not fit; the text begins with its name. Only
            metadata is looked at, so no device is waited for.
    """
    _check_tensors(value=value, locations=locations, weights=weights)
    flat_shapes = check_shapes(shapes, value)
    points = _check_points(points_per_level, len(flat_shapes) // 2, locations)
    level_axes = [sum(points)] if points_per_level is not None else [len(points), points[0]]
    expected = [value.shape[0], locations.shape[1], value.shape[2], *level_axes]
    _check_size("locations", locations, [*expected, 2])
    _check_size("weights", weights, expected)
    _check_dtypes(value, locations, weights)
    if points_per_level is None:
        locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
    if forward_ad._current_level >= 0:  # in forward mode, operators lose derivatives silently
        shapes = list(zip(flat_shapes[::2], flat_shapes[1::2]))
        return reference.by_gathering(value, shapes, points, locations, weights)
    return operators.forward(value, flat_shapes, points, locations, weights)


def _check_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: a tensor is needed, got {type(tensor).__name__}")
        if tensor.device != tensors["value"].device:
            where = f"it is on {tensor.device}, value is on {tensors['value'].device}"
            raise ValueError(f"{name}: all tensors must be on one device; {where}")
    dims = tensors["value"].dim()
    if dims != 4:
        raise ValueError(f"value: [B, S, H, D] is needed, got {dims} dimensions")
    if tensors["locations"].dim() < 2:
        raise ValueError("locations: [B, Q, H, L, P, 2] is needed, got fewer than 2 dimensions")


def check_shapes(shapes: Sequence[tuple[int, int]], value: Tensor) -> list[int]:
    """h0, w0, h1, w1, ...; integers that are fit for `value`."""
    hint = "a sequence of (height, width) is needed, such as [(100, 167), (50, 84)]"
    if isinstance(shapes, Tensor):
        raise TypeError(f"shapes: {hint}, not a tensor, which would make the host wait to read it")
    try:
        flat = [_integer(size) for height, width in shapes for size in (height, width)]
    except (TypeError, ValueError) as error:
        raise TypeError(f"shapes: {hint}, got {shapes!r}") from error
    if not flat or min(flat) < 1:
        raise ValueError(f"shapes: at least one level, and no side below 1, got {shapes!r}")
    tokens = sum(height * width for height, width in zip(flat[::2], flat[1::2]))
    if tokens != value.shape[1]:
        raise ValueError(
            f"shapes: {shapes!r} add up to {tokens} tokens, but value has S = {value.shape[1]}"
        )
    return flat


def _integer(size: int) -> int:
    if torch.jit.is_tracing():
        return int(size)  # there, sizes of tensors are tensors
    if isinstance(size, Tensor):
        raise TypeError
    # operator.index would fix the sizes of a compiled program.
    return size if isinstance(size, (int, torch.SymInt)) else operator.index(size)


def _check_points(given: Sequence[int] | None, levels: int, locations: Tensor) -> list[int]:
    if given is None:
        if locations.dim() != 6:
            raise ValueError(
                f"locations: [B, Q, H, L, P, 2] is needed (or points_per_level beside it), got "
                f"{list(locations.shape)}"
            )
        return [_integer(locations.shape[4])] * levels
    try:
        points = [_integer(number) for number in given]
    except TypeError as error:
        raise TypeError(f"points_per_level: integers are needed, got {given!r}") from error
    if len(points) != levels or min(points) < 0:
        raise ValueError(
            f"points_per_level: a number for each of the {levels} levels is needed, got {given!r}"
        )
    return points


def _check_size(name: str, tensor: Tensor, expected: list[int]) -> None:
    if list(tensor.shape) != expected:
        raise ValueError(
            f"{name}: {expected} is needed beside the other arguments, got {list(tensor.shape)}"
        )


def _check_dtypes(value: Tensor, locations: Tensor, weights: Tensor) -> None:
    if value.dtype not in _DTYPES:
        raise TypeError(f"value: float32, float64, float16 or bfloat16 needed, got {value.dtype}")
    double = value.dtype == torch.float64
    needed = torch.float64 if double else torch.float32
    if locations.dtype != needed:
        raise TypeError(
            f"locations: {needed} is needed beside {value.dtype} values, got {locations.dtype}: "
            "in low precision, points would be misplaced by up to a pixel"
        )
    allowed = {needed} if double else {value.dtype, operators.autocast_dtype(value), torch.float32}
    if weights.dtype not in allowed:
        names = " or ".join(sorted(map(str, allowed)))
        raise TypeError(
            f"weights: {names} is needed beside {value.dtype} values, got {weights.dtype}"
        )
