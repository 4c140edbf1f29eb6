"""The CUDA kernels, executed on the CPU (cuda_on_cpu/), against plain loops in float64."""

import ctypes
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from tests.layers.deformable import cuda_on_cpu, loops

NAN = float("nan")
FLOATS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
# one unit in the last place, and some for the sums in float
TOLERANCES = {
    torch.float32: 3e-6,
    torch.float64: 1e-14,
    torch.float16: 2**-11 + 3e-6,
    torch.bfloat16: 2**-8 + 3e-6,
}
SHAPES, POINTS = [(4, 7), (1, 1), (5, 3), (2, 2)], [3, 1, 0, 2]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    reason = cuda_on_cpu.why_not()
    if reason:
        pytest.skip(reason)
    return cuda_on_cpu.CudaOnCpu(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(scope="module")
def sm_80_kernels(kernels, tmp_path_factory):
    return cuda_on_cpu.CudaOnCpu(tmp_path_factory.mktemp("cuda_on_cpu"), architecture=800)


def make_inputs(
    batch=2,
    queries=5,
    heads=2,
    channels=8,
    shapes=SHAPES,
    points=POINTS,
    dtype=torch.float32,
    weight_dtype=None,
    seed=0,
):
    """value, shapes, points, locations (some of them outside), weights."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=generator).to(dtype)
    sizes = batch, queries, heads, sum(points)
    locations = torch.rand(*sizes, 2, generator=generator, dtype=real) * 1.6 - 0.3
    weights = torch.rand(*sizes, generator=generator).to(weight_dtype or dtype)
    return value, shapes, points, locations, weights


def make_gradient(value, weights, seed=1):
    batch, queries, heads = weights.shape[:3]
    generator = torch.Generator().manual_seed(seed)
    sizes = batch, queries, heads * value.shape[-1]
    return torch.randn(*sizes, generator=generator).to(value.dtype)


def as_numpy(*arguments):
    return [a.double().numpy() if isinstance(a, torch.Tensor) else a for a in arguments]


def assert_near(actual: torch.Tensor, expected: np.ndarray, tolerance: float | None = None):
    """The error as a part of the largest number; NaN and infinity must be where they are."""
    if tolerance is None:
        tolerance = TOLERANCES[actual.dtype]
    actual = actual.double().numpy()
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    scale = np.abs(expected[finite]).max(initial=0)
    assert np.abs(actual[finite] - expected[finite]).max(initial=0) <= tolerance * scale


def check(kernels, inputs, shift=0, deterministic=False):
    value, weights = inputs[0], inputs[-1]
    assert_near(kernels.forward(*inputs, shift=shift), loops.forward(*as_numpy(*inputs)))
    gradient = make_gradient(value, weights)
    expected = loops.backward(*as_numpy(gradient, *inputs))
    actual = kernels.backward(gradient, *inputs, shift=shift, deterministic=deterministic)
    real = inputs[3].dtype
    assert [a.dtype for a in actual] == [real, real, weights.dtype]
    # the fixed point has fewer bits than double has
    assert_near(actual[0], expected[0], 1e-11 if deterministic and real == torch.float64 else None)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_near(a, e)


@pytest.mark.parametrize("dtype, weight_dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 3, 5, 8, 16, 30, 32, 33, 64, 100, 256, 300])
def test_equal_to_loops(kernels, channels, dtype, weight_dtype):
    check(kernels, make_inputs(channels=channels, dtype=dtype, weight_dtype=weight_dtype))


@pytest.mark.parametrize("dtype, weight_dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 8, 32, 33])
def test_deterministic_equal_to_loops(kernels, channels, dtype, weight_dtype):
    inputs = make_inputs(channels=channels, dtype=dtype, weight_dtype=weight_dtype)
    check(kernels, inputs, deterministic=True)


@pytest.mark.parametrize("dtype, weight_dtype", FLOATS)
def test_equal_to_loops_without_vector_atomics(sm_80_kernels, dtype, weight_dtype):
    check(sm_80_kernels, make_inputs(channels=32, dtype=dtype, weight_dtype=weight_dtype))


@pytest.mark.parametrize("dtype, weight_dtype", FLOATS)
def test_addresses_that_are_not_aligned(kernels, dtype, weight_dtype):
    inputs = make_inputs(channels=32, dtype=dtype, weight_dtype=weight_dtype)
    check(kernels, inputs, shift=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [7, 32])
def test_strided_value(kernels, channels, dtype):
    value, *others = make_inputs(batch=3, channels=channels, dtype=dtype)
    batch, tokens, heads, _ = value.shape
    # one of several layers' values of each token, in a longer sequence
    memory = torch.full((batch, tokens + 2, 3, heads, channels), NAN, dtype=dtype)
    strided = memory[:, 1:-1, 1]
    strided.copy_(value)
    check(kernels, [strided, *others])


@pytest.mark.parametrize("extra_of_token, extra_of_image", [(1, 0), (0, 1)])
def test_strides_that_are_not_aligned(kernels, extra_of_token, extra_of_image):
    value, *others = make_inputs(batch=3, channels=32)
    batch, tokens, heads, channels = value.shape
    token_stride = heads * channels + extra_of_token
    strides = tokens * token_stride + extra_of_image, token_stride, channels, 1
    memory = torch.full((batch * strides[0],), NAN)
    strided = memory.as_strided(value.shape, strides)
    strided.copy_(value)
    check(kernels, [strided, *others])


def test_value_expanded_over_the_batch(kernels):
    value, *others = make_inputs(batch=3)
    check(kernels, [value[:1].expand_as(value), *others])


@pytest.mark.parametrize("queries", [1, 33, 70])
@pytest.mark.parametrize("heads", [1, 3])
def test_numbers_of_queries_and_heads(kernels, queries, heads):
    check(kernels, make_inputs(batch=3, queries=queries, heads=heads, channels=32))


@pytest.mark.parametrize("batch", [7, 80])
def test_batches_that_divide_nothing(kernels, batch):
    check(kernels, make_inputs(batch=batch, queries=3, heads=1, channels=4))


def test_blocks_of_many_queries(kernels):
    """Enough work for blocks of 256 threads."""
    check(
        kernels,
        make_inputs(batch=1, queries=2100, heads=2, channels=4, shapes=[(3, 5)], points=[1]),
    )


@pytest.mark.parametrize("points", [[0, 0, 0, 0], [40, 0, 0, 3], [0, 0, 5, 0], [70, 1, 33, 2]])
@pytest.mark.parametrize("channels", [2, 32, 128])
def test_numbers_of_points(kernels, points, channels):
    check(kernels, make_inputs(points=points, channels=channels))


def test_as_many_levels_as_there_may_be(kernels):
    shapes = [(1 + level % 3, 1 + level % 4) for level in range(64)]
    check(kernels, make_inputs(shapes=shapes, points=[1] * 64))


def with_pixels(xs, ys, height, width, dtype=torch.float32, **others):
    """Inputs whose points lie at all pairs of these pixel coordinates of one map."""
    pixels = torch.tensor([[x, y] for x in xs for y in ys], dtype=torch.float64)
    locations = (pixels + 0.5) / torch.tensor([width, height])
    inputs = make_inputs(shapes=[(height, width)], points=[len(pixels)], dtype=dtype, **others)
    inputs[3][:] = locations.to(inputs[3].dtype)
    return inputs


@pytest.mark.parametrize("height, width", [(4, 8), (1, 1), (1, 4), (2, 1)])
@pytest.mark.parametrize("channels", [3, 32])
def test_borders(kernels, height, width, channels):
    """Exactly on pixels, at the border, and one pixel outside: dyadic, so without rounding."""

    def numbers(size):
        return [-1.5, -1, -0.75, 0, 0.25, size - 1, size - 0.75, size - 2**-10, size, size + 0.5]

    check(kernels, with_pixels(numbers(width), numbers(height), height, width, channels=channels))


@pytest.mark.parametrize("far", [1e9, -1e9, 1e30, -1e30, 3e38, math.inf, -math.inf])
def test_far_away(kernels, far):
    inputs = make_inputs(channels=32)
    locations = inputs[3]
    locations[:, :2, :, ::2, 0] = far
    locations[:, 1:3, :, 1::2, 1] = far
    check(kernels, inputs)
    inputs[-1][:, :2, :, ::2] = NAN  # where there is no sample, its weight does not matter
    check(kernels, inputs)


def test_points_outside_have_no_gradient_whatever_that_of_the_output(kernels):
    inputs = make_inputs(channels=32)
    gradient = make_gradient(inputs[0], inputs[-1])
    gradient[:, 2] = NAN
    inputs[3][:, :, :, 1] = 5.0
    _, of_locations, of_weights = kernels.backward(gradient, *inputs)
    assert not of_locations[:, :, :, 1].any() and not of_weights[:, :, :, 1].any()
    assert of_weights[:, 2].isnan().any()


@pytest.mark.parametrize("broken", [NAN, math.inf])
def test_pixels_that_take_no_part_are_not_read(kernels, broken):
    """Points at the borders of the second map; the other maps, and pixels not theirs, broken."""
    shapes, xs = [(2, 3), (4, 8), (3, 2)], [-0.75, 0.25, 6.25, 7.5]
    inputs = with_pixels(xs, [-0.5, 0, 2.5, 3.25], 4, 8, channels=32)
    points = [2, inputs[3].shape[3], 2]
    outside = torch.full((*inputs[3].shape[:3], 2, 2), -3.0)
    locations = torch.cat([outside, inputs[3], outside], dim=3)
    value, _, _, _, weights = make_inputs(shapes=shapes, points=points, channels=32)
    value[:, :6] = value[:, 38:] = broken
    middle = value[:, 6:38].unflatten(1, (4, 8))
    middle[:, :, 2:6] = broken
    inputs = value, shapes, points, locations, weights
    check(kernels, inputs)
    assert kernels.forward(*inputs).isfinite().all()
    middle[:, 1, 7] = broken  # one that is read
    assert not kernels.forward(*inputs).isfinite().any()


def test_infinity_at_the_border_stays_infinity(kernels):
    inputs = with_pixels([-0.5, 3.25], [-0.25, 3.5], 4, 4, channels=4)
    inputs[0][:, [0, 3, 12, 15]] = math.inf
    output = kernels.forward(*inputs)
    assert torch.equal(output, torch.full_like(output, math.inf))


@pytest.mark.parametrize("deterministic", [False, True])
def test_coordinates_that_are_nan(kernels, deterministic):
    inputs = make_inputs(channels=32)
    value, _, _, locations, weights = inputs
    locations[:] = locations.clamp(0.1, 0.9)
    for query, coordinates in ((1, [0]), (2, [1]), (3, [0, 1])):
        locations[:, query, 1, 2, coordinates] = NAN
    assert_near(kernels.forward(*inputs), loops.forward(*as_numpy(*inputs)))

    gradient = make_gradient(value, weights)
    of_value, of_locations, of_weights = kernels.backward(
        gradient, *inputs, deterministic=deterministic
    )
    expected = loops.backward(*as_numpy(gradient, *inputs))
    assert_near(of_weights, expected[2])
    is_nan = np.isnan(expected[1])
    assert of_locations.isnan().numpy()[is_nan].reshape(-1, 2).any(1).all()
    assert np.isfinite(of_locations.numpy()[~is_nan]).all()
    # only pixels of the first map and the second head can have been touched
    if deterministic:
        assert of_value.isnan().all()
    else:
        assert of_value[:, :28, 1].isnan().any() and of_value[:, :, 0].isfinite().all()
        assert of_value[:, 28:].isfinite().all()


def test_deterministic_gradient_is_the_same_in_any_order(kernels):
    inputs = make_inputs(queries=64, channels=8, shapes=[(2, 2)], points=[8])
    gradient = make_gradient(inputs[0], inputs[-1]) * 10.0 ** torch.arange(-8, 8).repeat(1, 64, 1)
    runs = [kernels.backward(gradient, *inputs, deterministic=True)[0] for _ in range(4)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    others = [kernels.backward(gradient, *inputs)[0] for _ in range(4)]
    assert any(not torch.equal(run, others[0]) for run in others)  # the order does change


def test_deterministic_gradient_where_all_add_at_one_address(kernels):
    """The largest sum there can be: every point on the only pixel, with the largest product."""
    inputs = make_inputs(queries=33, heads=1, channels=1, shapes=[(1, 1)], points=[31])
    value, _, _, locations, weights = inputs
    locations.fill_(0.5)
    weights.fill_(3.0)
    for size in (1.0, -7.3e37, 1e-30):
        gradient = torch.full((2, 33, 1), size)
        of_value, *_ = kernels.backward(gradient, *inputs, deterministic=True)
        exact = 33 * 31 * 3.0 * gradient[0, 0, 0].double()
        assert_near(of_value, np.full(value.shape, exact.float().double()))


def test_deterministic_gradient_of_large_and_small_heads(kernels):
    """An error is relative to the largest product anywhere, and far below float32's."""
    inputs = make_inputs(queries=9, channels=4)
    gradient = make_gradient(inputs[0], inputs[-1])
    gradient[..., 4:] *= 1e-6
    of_value, *_ = kernels.backward(gradient, *inputs, deterministic=True)
    expected, *_ = loops.backward(*as_numpy(gradient, *inputs))
    for head in range(2):
        assert_near(of_value[:, :, head], expected[:, :, head])


@pytest.mark.parametrize("which", ["gradient", "weights"])
@pytest.mark.parametrize("where", [0, 1, 31, 37, 118, 119])
def test_deterministic_gradient_where_one_number_is_large(kernels, where, which):
    """The bound is the largest number, whichever thread reads it."""
    inputs = make_inputs()
    inputs[3].clamp_(0.1, 0.9)
    gradient, weights = torch.ones(2, 5, 16), inputs[-1].fill_(1.0)
    changed = gradient if which == "gradient" else weights
    changed.mul_(1e-20).view(-1)[where] = 1.0
    of_value, *_ = kernels.backward(gradient, *inputs, deterministic=True)
    assert_near(of_value, loops.backward(*as_numpy(gradient, *inputs))[0])


@pytest.mark.parametrize("broken", [NAN, math.inf])
def test_deterministic_gradient_is_nan_even_if_no_point_is_inside(kernels, broken):
    inputs = make_inputs()
    inputs[3][1, 2] = 5.0
    inputs[-1][1, 2] = broken
    gradient = make_gradient(inputs[0], inputs[-1])
    of_value, *_ = kernels.backward(gradient, *inputs, deterministic=True)
    assert of_value.isnan().all()


@pytest.mark.parametrize("broken", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "weights"])
def test_deterministic_gradient_is_nan_where_inputs_are_not_finite(kernels, broken, where):
    inputs = make_inputs()
    gradient = make_gradient(inputs[0], inputs[-1])
    (gradient if where == "gradient" else inputs[-1])[1, 2] = broken
    of_value, *_ = kernels.backward(gradient, *inputs, deterministic=True)
    assert of_value.isnan().all()


def test_deterministic_gradient_of_nothing_is_zero(kernels):
    inputs = make_inputs()
    gradient = torch.zeros_like(make_gradient(inputs[0], inputs[-1]))
    assert all(not g.any() for g in kernels.backward(gradient, *inputs, deterministic=True))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"heads": 0}, {"channels": 0}])
def test_sizes_that_are_zero(kernels, sizes, deterministic):
    check(kernels, make_inputs(**sizes), deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_no_levels(kernels, deterministic):
    check(kernels, make_inputs(shapes=[], points=[]), deterministic=deterministic)


@pytest.mark.parametrize(
    "field, number",
    [
        ("num_levels", 65),
        ("tokens", 2**31),
        ("queries", 2**31),
        ("points", 2**31),
        ("value_token_stride", 2**29),
    ],
)
def test_what_cannot_be_indexed_is_an_error_of_the_launch(kernels, field, number):
    inputs = make_inputs()
    problem = cuda_on_cpu.make_problem(inputs[0], inputs[1], inputs[2], inputs[4])
    setattr(problem, field, number)
    invalid_value, nowhere = 1, [None] * 4
    assert kernels.library.forward(ctypes.byref(problem), *nowhere) == invalid_value
    tensors = cuda_on_cpu.BackwardTensors()
    assert kernels.library.backward(ctypes.byref(problem), ctypes.byref(tensors)) == invalid_value


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", ["forward.cu", "backward.cu"])
def test_compiles_without_torch_and_without_spilled_registers(source, architecture, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-c"]
    command += [str(cuda_on_cpu.KERNELS / source), "-o", str(tmp_path / "kernels.o")]
    result = subprocess.run(command, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", result.stderr)]
    assert spilled and not any(spilled), result.stderr
