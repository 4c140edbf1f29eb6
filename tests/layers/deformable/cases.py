"""Problems for tests of multi-scale deformable attention, and how results are compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.layers.deformable import loops

# Of the largest number that is expected. float32: positions on a map of some hundred pixels.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
NAMES = ("output", "gradient of value", "gradient of locations", "gradient of weights")


@dataclass(frozen=True)
class Problem:
    """Arguments of the operation (points of all levels in one axis), and a gradient of its output.

    value [B, S, H, D], locations [B, Q, H, N, 2], weights [B, Q, H, N], gradient [B, Q, H * D]
    """

    value: Tensor
    shapes: Sequence[tuple[int, int]]
    points: Sequence[int]
    locations: Tensor
    weights: Tensor
    gradient: Tensor

    @property
    def arguments(self) -> tuple:
        """As the functions of reference.py take them."""
        return self.value, self.shapes, self.points, self.locations, self.weights

    @property
    def flat_arguments(self) -> tuple:
        """As the operators take them."""
        flat = [side for shape in self.shapes for side in shape]
        return self.value, flat, list(self.points), self.locations, self.weights

    def to(self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> "Problem":
        """In the dtypes that belong to values of `dtype`."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return replace(
            self,
            value=self.value.to(dtype),
            locations=self.locations.to(exact),
            weights=self.weights.to(weight_dtype or dtype),
            gradient=self.gradient.to(dtype),
        )


def random_problem(
    shapes: Sequence[tuple[int, int]] = ((6, 5), (3, 4)),
    points: Sequence[int] = (3, 2),
    batch: int = 2,
    queries: int = 5,
    heads: int = 2,
    channels: int = 4,
    seed: int = 0,
) -> Problem:
    """In float64; a fifth of the points lie beyond the borders on either side."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    tokens, rows = sum(h * w for h, w in shapes), (batch, queries, heads, sum(points))
    return Problem(
        torch.randn(batch, tokens, heads, channels, **options),
        shapes,
        points,
        torch.rand(*rows, 2, **options) * 1.6 - 0.3,
        torch.randn(rows, **options),
        torch.randn(batch, queries, heads * channels, **options),
    )


def nan_location_problem(channels: int = 4) -> Problem:
    """In float64; of two of the points one coordinate is NaN."""
    problem = random_problem(channels=channels)
    locations = problem.locations.clamp(0, 1)
    locations[0, 1, 0, 2, 0] = locations[1, 0, 1, 0, 1] = torch.nan
    return replace(problem, locations=locations)


def smooth_problem(seed: int = 0, **sizes: int) -> Problem:
    """In float64; no point is near a pixel's centre, where the derivative has a step."""
    shapes, points = ((4, 3), (2, 5)), (2, 1)
    problem = random_problem(shapes, points, seed=seed, **sizes)
    generator = torch.Generator().manual_seed(seed + 1)
    size = torch.tensor([[w, h] for (h, w), n in zip(shapes, points) for _ in range(n)])
    pixel = torch.floor(problem.locations * size) + 0.2
    pixel += 0.6 * torch.rand(pixel.shape, generator=generator, dtype=torch.float64)
    return replace(problem, locations=(pixel + 0.5) / size)


FAR = (1e30, -1e30, float("inf"), -float("inf"))


def border_problem(far: Sequence[float] = FAR, channels: int = 3) -> Problem:
    """Two maps; every query has a point on each, and they pass over all places that matter.

    Sides are powers of two, so that borders and pixel centres are hit exactly in float32.
    """
    shapes = ((4, 8), (2, 2))
    places = []
    for height, width in shapes:
        x, y = (
            torch.tensor(
                [-1.25, -1, -0.75, -0.5, 0, 0.25, side - 1, side - 0.5, side, side + 0.25, *far],
                dtype=torch.float64,
            )
            for side in (width, height)
        )
        pixels = torch.cartesian_prod(x, y)
        places.append((pixels + 0.5) / torch.tensor([width, height]))
    locations = torch.stack(places, dim=1)[None, :, None].clamp(-3e38, 3e38)
    if float("inf") in far:
        infinite = torch.stack(places, dim=1)[None, :, None]
        locations = torch.where(infinite.isinf(), infinite, locations)
    queries = locations.shape[1]
    problem = random_problem(shapes, (1, 1), 1, queries, heads=1, channels=channels)
    return replace(problem, locations=locations)


def with_nan_pixels(problem: Problem) -> Problem:
    """The first and the last pixel of every level are NaN."""
    value, first = problem.value.clone(), 0
    for height, width in problem.shapes:
        value[:, [first, first + height * width - 1]] = torch.nan
        first += height * width
    return replace(problem, value=value)


# Sizes of `random_problem`, by what they try.
GRID = {
    "one level": dict(shapes=[(4, 4)], points=[4]),
    "levels that are not square": dict(shapes=[(7, 3), (2, 5), (1, 4)], points=[2, 2, 2]),
    "four levels": dict(shapes=[(9, 11), (5, 6), (3, 3), (2, 2)], points=[4] * 4, heads=8),
    "points as in D-FINE": dict(shapes=[(8, 6), (4, 3), (2, 2)], points=[3, 6, 3]),
    "a level without points": dict(shapes=[(3, 4), (5, 2), (2, 2)], points=[2, 0, 3]),
    "first level without points": dict(shapes=[(3, 4), (5, 2)], points=[0, 1]),
    "no points at all": dict(shapes=[(3, 4), (2, 2)], points=[0, 0]),
    "many points": dict(shapes=[(5, 4), (2, 3)], points=[70, 41], queries=2),
    "levels of one pixel": dict(shapes=[(1, 1), (1, 1)], points=[2, 3]),
    "levels of one row, one column": dict(shapes=[(1, 9), (8, 1)], points=[3, 3]),
    "no queries": dict(queries=0),
    "no batch": dict(batch=0),
    "no queries and no batch": dict(batch=0, queries=0),
    "no channels": dict(channels=0),
    "one head": dict(heads=1, channels=32),
    "three heads": dict(heads=3, channels=16),
    "more queries than tokens": dict(queries=67),
    **{f"{d} channels": dict(channels=d) for d in (1, 3, 5, 8, 16, 30, 32, 33, 64, 100, 256)},
    # FlashDeformAttn's blocks straddled images; Deformable-DETR#224: batch % im2col_step
    **{f"batch of {b}": dict(batch=b, queries=3, points=[1, 1]) for b in (80, 96, 154)},
}
DTYPES = [  # of values, of weights
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_gradients(function: Callable[..., Tensor], problem: Problem) -> list[Tensor]:
    """The output of `function(value, shapes, points, locations, weights)`, and three gradients."""
    value, locations, weights = leaves = [
        tensor.detach().requires_grad_()
        for tensor in (problem.value, problem.locations, problem.weights)
    ]
    output = function(value, problem.shapes, problem.points, locations, weights)
    return [output.detach(), *torch.autograd.grad(output, leaves, problem.gradient)]


def expected_results(problem: Problem) -> list[Tensor]:
    """The same four from the loops, in float64."""
    arrays = [x if isinstance(x, list | tuple) else x.double().numpy() for x in problem.arguments]
    gradient = problem.gradient.double().numpy()
    results = [loops.forward(*arrays), *loops.backward(gradient, *arrays)]
    return [torch.from_numpy(array) for array in results]


def assert_nan_location(actual: Sequence[Tensor], problem: Problem) -> None:
    """That NaN locations make NaN of all results that depend on them, and of no others.

    Only which pixels such a point lies on, and so its share in the gradient of value, is not
    defined; nor is which of its two coordinates has a NaN gradient.
    """
    expected = expected_results(problem)[2].isnan().any(-1, keepdim=True)
    assert torch.equal(actual[2].isnan().any(-1, keepdim=True), expected)
    locations = torch.where(expected, torch.nan, actual[2])
    assert_results([*actual[:2], locations, actual[3]], problem, skip=["gradient of value"])


def assert_results(
    actual: Sequence[Tensor], problem: Problem, skip: Sequence[str] = (), factor: float = 1
) -> None:
    """That output and gradients are those of the loops, in the right dtypes and shapes."""
    sources = (problem.value, problem.value, problem.locations, problem.weights)
    for name, result, expected, source in zip(NAMES, actual, expected_results(problem), sources):
        if name in skip:
            continue
        assert result.dtype == source.dtype, name
        assert result.shape == expected.shape, name
        finite = expected[expected.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0
        torch.testing.assert_close(
            result.double(),
            expected,
            rtol=0,
            atol=factor * TOLERANCES[result.dtype] * largest,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )
