"""What is measured: calls of the size that detectors make, and what each of them must cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HEADS, CHANNELS, POINTS, STRIDES = 8, 32, 4, (8, 16, 32, 64)
OFFSET = 3.0  # standard deviation of sampling points around their reference, in pixels
PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, and a gradient of its output.

    value [B, S, H, D], shapes ((h, w) of every level), locations [B, Q, H, L, P, 2], weights
    [B, Q, H, L, P], gradient [B, Q, H * D]; value, weights and gradient in the dtype that is
    measured, locations in float32 (for float64: float64).
    """

    value: Tensor
    shapes: tuple[tuple[int, int], ...]
    locations: Tensor
    weights: Tensor
    gradient: Tensor

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """value, locations and weights, detached, with gradients."""
        tensors = (self.value, self.locations, self.weights)
        return tuple(tensor.detach().requires_grad_() for tensor in tensors)


@dataclass(frozen=True)
class Case:
    """Deformable attention on the pyramid of an image; 8 heads of 32 channels, 4 points a level.

    Args:
        name: such as "encoder 22k".
        image: (height, width) in pixels.
        batch: B.
        queries: of a decoder; 0 for an encoder, in which every token is a query.
    """

    name: str
    image: tuple[int, int]
    batch: int = 1
    queries: int = 0

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple(tuple(math.ceil(s / stride) for s in self.image) for stride in STRIDES)

    @property
    def tokens(self) -> int:
        return sum(height * width for height, width in self.shapes)

    @property
    def rows(self) -> int:
        """Queries of all images."""
        return self.batch * (self.queries or self.tokens)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Random values; points lie as in a trained model, near a reference point.

        References are the pixels' centres in an encoder, and anywhere in a decoder.
        """
        generator = torch.Generator().manual_seed(seed)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        options = {"generator": generator, "dtype": exact}
        queries = self.queries or self.tokens
        if self.queries:
            reference = torch.rand(self.batch, queries, 2, **options)
        else:
            reference = pixel_centres(self.shapes, exact).expand(self.batch, -1, -1)
        rows = (self.batch, queries, HEADS, len(self.shapes), POINTS)
        size = torch.tensor([(width, height) for height, width in self.shapes], dtype=exact)
        locations = torch.randn(*rows, 2, **options).mul_(OFFSET).div_(size[:, None])
        locations += reference[:, :, None, None, None]
        value = torch.randn(self.batch, self.tokens, HEADS, CHANNELS, **options)
        weights = torch.randn(rows, **options).flatten(-2).softmax(-1).view(rows)
        gradient = torch.randn(self.batch, queries, HEADS * CHANNELS, **options)
        return Inputs(
            value.to(device, dtype),
            self.shapes,
            locations.to(device),
            weights.to(device, dtype),
            gradient.to(device, dtype),
        )


def pixel_centres(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """[S, 2]: (x, y) in 0..1 of every token."""
    levels = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, dtype=dtype) + 0.5) / width
        levels.append(torch.cartesian_prod(y, x).flip(-1))
    return torch.cat(levels)


def standard_cases() -> list[Case]:
    """Encoders and decoders on images of the usual test size, and of half its area."""
    small, large = (566, 943), (800, 1333)
    return [
        Case(name, image, batch, queries)
        for name, image, queries in (
            ("encoder 11k", small, 0),
            ("encoder 22k", large, 0),
            ("decoder 300", small, 300),
            ("decoder 900", large, 900),
        )
        for batch in (1, 2)
    ]


def cases_of(image: tuple[int, int], batches: Sequence[int]) -> list[Case]:
    """The same on images of another size, (height, width)."""
    return [
        Case(name, image, batch, queries)
        for name, queries in (("encoder", 0), ("decoder 300", 300), ("decoder 900", 900))
        for batch in batches
    ]


@dataclass(frozen=True)
class Work:
    """What no implementation can avoid.

    Args:
        moved: bytes: pixels that are sampled, other inputs and results, each once; zeros of the
            value's gradient once more.
        operations: of floating point, for the four pixels of all samples.
        results: bytes of the output, or of the gradients.
    """

    moved: int
    operations: int
    results: int


def least_work(inputs: Inputs, passes: str) -> Work:
    """Of a call of one of PASSES."""
    points = _bytes(inputs.locations) + _bytes(inputs.weights)
    pixels = sampled_pixels(inputs) * inputs.value.shape[-1] * inputs.value.element_size()
    output = _bytes(inputs.gradient)
    gradients = _bytes(inputs.value) + points
    products = 4 * inputs.weights.numel() * inputs.value.shape[-1]
    forward = Work(pixels + points + output, 2 * products, output)
    backward = Work(forward.moved + gradients + pixels, 4 * products, gradients)
    both = (forward.moved + backward.moved, forward.operations + backward.operations, gradients)
    return {"forward": forward, "backward": backward, "forward+backward": Work(*both)}[passes]


def sampled_pixels(inputs: Inputs) -> int:
    """How many of value's rows (b, s, h) some sampling point touches."""
    batch, tokens, heads, _ = inputs.value.shape
    touched = torch.zeros(batch, heads, tokens, dtype=torch.bool, device=inputs.value.device)
    first = 0
    for (height, width), locations in zip(inputs.shapes, inputs.locations.unbind(3)):
        size = locations.new_tensor([width, height])
        corner = (locations * size - 0.5).floor().transpose(1, 2).flatten(2, 3)  # [B, H, Q * P, 2]
        level = touched[..., first : first + height * width]
        for offset in ((0, 0), (1, 0), (0, 1), (1, 1)):
            pixel = corner + corner.new_tensor(offset)
            inside = ((pixel >= 0) & (pixel < size)).all(-1)
            x, y = pixel.long().unbind(-1)
            images, of_heads, _ = inside.nonzero(as_tuple=True)
            level[images, of_heads, (y * width + x)[inside]] = True
        first += height * width
    return int(touched.sum())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
