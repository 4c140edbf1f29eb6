"""The operators on a GPU (test_cuda_kernels.py executes the same kernels where there is none)."""

import os
from dataclasses import fields, replace

import pytest
import torch

from dn_detr.layers import multi_scale_deformable_attention
from dn_detr.layers.deformable import extension, operators
from tests.layers.deformable.cases import (
    DTYPES,
    GRID,
    Problem,
    assert_nan_location,
    assert_results,
    border_problem,
    dtype_name,
    nan_location_problem,
    random_problem,
    with_gradients,
    with_nan_pixels,
)

pytestmark = pytest.mark.gpu
STRICT = os.environ.get("STRICT", "") not in ("", "0")
DEVICE = "cuda"


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not extension.has_kernel("cuda"):
        reason = f"no compiled CUDA kernels: {extension.MISSING or 'not in this build'}"
        (pytest.fail if STRICT else pytest.skip)(reason)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on(device: str | torch.device, problem: Problem) -> Problem:
    values = {field.name: getattr(problem, field.name) for field in fields(problem)}
    tensors = {name: v.to(device) for name, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(problem, **tensors)


def run_there(problem):
    """Output and gradients, by a problem whose tensors are on the GPU; no synchronisation."""
    arguments = problem.flat_arguments
    return [operators.forward(*arguments), *operators.backward(problem.gradient, *arguments)]


def run(problem):
    return [result.cpu() for result in run_there(on(DEVICE, problem))]


@pytest.mark.fault(66)
@pytest.mark.parametrize("sizes", GRID.values(), ids=GRID.keys())
def test_equals_the_loops(sizes):
    problem = random_problem(**sizes)
    assert_results(run(problem), problem)
    problem = problem.to(torch.float32)
    assert_results(run(problem), problem)


@pytest.mark.fault(66)
@pytest.mark.parametrize("channels", [1, 3, 5, 8, 16, 30, 32, 33, 64, 100, 256, 300])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
def test_equals_the_loops_in_every_dtype(dtypes, channels):
    problem = random_problem(channels=channels, queries=70).to(*dtypes)
    assert_results(run(problem), problem)


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
def test_borders_infinity_and_nan(dtypes, channels):
    for problem in (
        border_problem(channels=channels),
        with_nan_pixels(border_problem(channels=channels)),
    ):
        problem = problem.to(*dtypes)
        assert_results(run(problem), problem)
    problem = nan_location_problem(channels).to(*dtypes)
    assert_nan_location(run(problem), problem)


@pytest.mark.fault(66)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
def test_encoder_of_many_blocks_equals_the_cpu(dtypes):
    """Enough queries for full blocks on every multiprocessor; expected values from float64."""
    shapes = [(50, 84), (25, 42), (13, 21), (7, 11)]
    problem = random_problem(shapes, [4] * 4, queries=5600, heads=8, channels=32)
    # away from the pixels' centres, where the derivative has a step
    size = torch.tensor([[w, h] for h, w in shapes for _ in range(4)])
    pixel = torch.floor(problem.locations * size) + 0.2 + 0.6 * torch.rand_like(problem.locations)
    problem = replace(problem, locations=(pixel + 0.5) / size).to(*dtypes)
    exact = problem.to(torch.float64)
    arguments = exact.flat_arguments
    expected = [operators.forward(*arguments), *operators.backward(exact.gradient, *arguments)]
    for result, wanted in zip(run(problem), expected):
        tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-4}
        atol = tolerance.get(result.dtype, 1e-11) * wanted.abs().max().item()
        torch.testing.assert_close(result.double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("shift", [0, 1])
def test_strided_and_unaligned_values(dtype, shift):
    problem = on(DEVICE, random_problem(channels=32).to(dtype))
    expected = run_there(problem)
    batch, tokens, heads, channels = problem.value.shape
    memory = torch.full((batch * (tokens + 1) * 2 * heads * channels + shift,), torch.nan)
    memory = memory.to(DEVICE, dtype)[shift:].view(batch, tokens + 1, 2, heads, channels)
    strided = memory[:, 1:, 1]
    strided.copy_(problem.value)
    for result, wanted in zip(run_there(replace(problem, value=strided)), expected):
        torch.testing.assert_close(result, wanted)


def test_public_function_and_autocast():
    problem = random_problem(channels=32).to(torch.float32)
    results = with_gradients(
        lambda value, shapes, points, locations, weights: multi_scale_deformable_attention(
            value, shapes, locations, weights, points
        ),
        on(DEVICE, problem),
    )
    assert_results([result.cpu() for result in results], problem)
    value, shapes, points, locations, weights = on(DEVICE, problem).arguments
    with torch.autocast("cuda", torch.bfloat16):
        lowered = multi_scale_deformable_attention(value, shapes, locations, weights, points)
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float().cpu(), results[0].cpu(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
def test_deterministic_gradients_are_the_same_bits(deterministic, dtypes, channels):
    problem = random_problem([(5, 4), (2, 2)], [4, 4], queries=3000, heads=4, channels=channels).to(
        *dtypes
    )
    first = run(problem)
    assert_results(first, problem, factor=10)
    for _ in range(5):
        for result, expected in zip(run(problem), first):
            assert torch.equal(result, expected)


def test_deterministic_gradients_where_something_is_not_finite(deterministic):
    problem = random_problem(channels=32).to(torch.float32)
    problem.gradient[1, 2, 3] = torch.inf
    assert run(problem)[1].isnan().all()
    problem = nan_location_problem(channels=32).to(torch.float32)
    assert run(problem)[1].isnan().all()


def test_second_gpu_while_the_first_one_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    problem = random_problem(channels=32).to(torch.float32)
    with torch.cuda.device(0):
        results = run_there(on("cuda:1", problem))
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_results([result.cpu() for result in results], problem)


def test_current_stream_is_used():
    """Inputs that arrive late on a stream of their own."""
    problem = random_problem(channels=32).to(torch.float32)
    there = on(DEVICE, problem)
    late = replace(there, value=torch.zeros_like(there.value))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.value.copy_(there.value)
        results = run_there(late)
    stream.synchronize()
    assert_results([result.cpu() for result in results], problem)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_capture_in_a_graph(is_deterministic, request):
    if is_deterministic:
        request.getfixturevalue("deterministic")
    problems = [random_problem(channels=32, seed=seed).to(torch.float32) for seed in range(2)]
    static = on(DEVICE, problems[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_there(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_there(static)
    for problem in problems:
        for name in ("value", "locations", "weights", "gradient"):
            getattr(static, name).copy_(getattr(problem, name))
        graph.replay()
        assert_results([result.cpu() for result in results], problem)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_host_does_not_wait(is_deterministic, request):
    if is_deterministic:
        request.getfixturevalue("deterministic")
    problem = on(DEVICE, random_problem(channels=32).to(torch.bfloat16))
    run_there(problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_there(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_too_many_levels():
    problem = on(DEVICE, random_problem([(1, 1)] * 65, [1] * 65).to(torch.float32))
    with pytest.raises(ValueError, match="shapes: on CUDA there may be 64 levels, got 65"):
        operators.forward(*problem.flat_arguments)
    with pytest.raises(ValueError, match="shapes: on CUDA there may be 64 levels, got 65"):
        operators.backward(problem.gradient, *problem.flat_arguments)


def last_of(problem, batch=0, queries=0):
    """The last images, or the last queries, alone."""

    def cut(tensor, is_value=False):
        tensor = tensor[-batch:] if batch else tensor
        return tensor if is_value or not queries else tensor[:, -queries:]

    return replace(
        problem,
        value=cut(problem.value, True).clone(),
        **{n: cut(getattr(problem, n)).clone() for n in ("locations", "weights", "gradient")},
    )


@pytest.mark.large
def test_values_of_more_than_2_to_the_31_elements():
    size, batch, heads, channels = 1024, 9, 8, 32
    assert batch * size * size * heads * channels > 2**31
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    problem = Problem(
        torch.randn(batch, size * size, heads, channels, **options),
        [(size, size)],
        [4],
        torch.rand(batch, 100, heads, 4, 2, device=DEVICE),
        torch.rand(batch, 100, heads, 4, **options),
        torch.randn(batch, 100, heads * channels, **options),
    )
    expected = run_there(last_of(problem, batch=1))
    for result, wanted in zip(run_there(problem), expected):
        torch.testing.assert_close(result[-1:], wanted)


@pytest.mark.large
def test_locations_of_more_than_2_to_the_31_elements():
    queries, heads, points = 2**20 + 5, 8, 128
    assert queries * heads * points * 2 > 2**31
    problem = Problem(
        torch.randn(1, 64, heads, 1, device=DEVICE),
        [(8, 8)],
        [points],
        torch.rand(1, queries, heads, points, 2, device=DEVICE),
        torch.rand(1, queries, heads, points, device=DEVICE),
        torch.randn(1, queries, heads, device=DEVICE),
    )
    expected = run_there(last_of(problem, queries=50))
    output, _, of_locations, of_weights = run_there(problem)
    for result, wanted in zip((output, of_locations, of_weights), (expected[0], *expected[2:])):
        torch.testing.assert_close(result[:, -50:], wanted)
