"""The compiled kernels for the CPU, with each instruction set that this CPU has."""

import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dn_detr.layers.deformable import extension, operators
from tests.layers.deformable.cases import (
    DTYPES,
    GRID,
    assert_nan_location,
    assert_results,
    border_problem,
    dtype_name,
    nan_location_problem,
    random_problem,
    with_nan_pixels,
)

SETS = ["generic", "avx2", "avx512"]
STRICT = os.environ.get("STRICT", "") not in ("", "0")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not extension.has_kernel("cpu"):
        reason = f"no compiled CPU kernels: {extension.MISSING or 'not in this build'}"
        (pytest.fail if STRICT else pytest.skip)(reason)
    before = extension.cpu_instructions()
    yield
    extension.cpu_instructions(before)


@pytest.fixture(params=SETS)
def instructions(request):
    try:
        extension.cpu_instructions(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(problem):
    arguments = problem.flat_arguments
    return [operators.forward(*arguments), *operators.backward(problem.gradient, *arguments)]


@pytest.mark.parametrize("sizes", GRID.values(), ids=GRID.keys())
def test_equals_the_loops(instructions, sizes):
    problem = random_problem(**sizes)
    assert_results(run(problem), problem)
    problem = problem.to(torch.float32)
    assert_results(run(problem), problem)


@pytest.mark.parametrize("channels", [1, 5, 8, 24, 32, 48])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
def test_equals_the_loops_in_every_dtype(instructions, dtypes, channels):
    problem = random_problem(channels=channels).to(*dtypes)
    assert_results(run(problem), problem)


@pytest.mark.parametrize("channels", [3, 8, 32])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
def test_borders_infinity_and_nan(instructions, dtypes, channels):
    for problem in (
        border_problem(channels=channels),
        with_nan_pixels(border_problem(channels=channels)),
    ):
        problem = problem.to(*dtypes)
        assert_results(run(problem), problem)
    problem = nan_location_problem(channels).to(*dtypes)
    assert_nan_location(run(problem), problem)


@pytest.mark.parametrize("channels", [3, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_bits_do_not_depend_on_threads_nor_on_the_run(instructions, threads, dtype, channels):
    """With fewer and with more slices than threads, which are cut in different ways."""
    for sizes in (dict(batch=1, heads=1), dict(batch=3, heads=4)):
        problem = random_problem(queries=1500, channels=channels, **sizes).to(dtype)
        results = []
        for number in (1, 2, 2, 5):
            threads(number)
            results.append(run(problem))
        for other in results[1:]:
            for a, b in zip(results[0], other):
                assert torch.equal(a, b)


@pytest.mark.parametrize("channels", [3, 8, 32])
@pytest.mark.parametrize("queries", [2, 400])
def test_all_pixels_and_all_results_are_touched_once(instructions, channels, queries):
    """Points in the pixels' centres copy the map; the sum of gradients is that of the weights.

    With few queries for their tokens, and with many: kernels fetch ahead in one case only.
    """
    height, width = 20, 20
    cells = torch.cartesian_prod(torch.arange(width), torch.arange(height))[:, None, None] + 0.5
    locations = (cells / 20)[None, :queries].expand(3, -1, 2, -1, -1).contiguous()
    problem = random_problem(
        [(height, width)], [1], batch=3, queries=queries, heads=2, channels=channels
    )
    problem = replace(problem, locations=locations, weights=torch.ones(3, queries, 2, 1))
    problem = problem.to(torch.float32)
    output, d_value, _, _ = run(problem)
    maps = problem.value.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)[:, :queries]
    torch.testing.assert_close(output, maps.flatten(2))
    expected = problem.gradient.unflatten(2, (2, channels)).sum(1)
    torch.testing.assert_close(d_value.sum(1), expected)


BAD = [  # changed arguments by position, error, its text
    ({1: [5, 6, 3, 5]}, ValueError, "shapes: they need more tokens than the 42 of value"),
    ({1: [5, 6, 2, 4]}, ValueError, "value: the level shapes add up to 38 tokens, got 42"),
    # The first two products wrap around to small numbers.
    ({1: [0x7CF000007D1, 0x19EFDB135DE7B131, 3, 4]}, ValueError, "shapes: they need more tokens"),
    ({1: [2**32, 2**32, 6, 7]}, ValueError, "shapes: they need more tokens than"),
    ({2: [2**63 - 1, 2**63 - 1]}, ValueError, "points_per_level: more points than the 5 of loc"),
    ({1: [6, 5, 0, 4]}, ValueError, "shapes: level 1 has no pixels"),
    ({1: [6, 5, 3]}, ValueError, "shapes: two numbers for each of points_per_level are needed"),
    ({2: [5, -1]}, ValueError, "points_per_level: negative at level 1"),
    ({2: [4, 2]}, ValueError, "points_per_level: more points than the 5 of locations"),
    ({2: [1, 1]}, ValueError, "locations: points_per_level adds up to 2 points, got 5"),
    ({0: torch.zeros(2, 42, 2, 4).long()}, TypeError, "value: no kernel for Long"),
    ({0: torch.zeros(2, 42, 8)}, ValueError, "value: .* is needed"),
    ({3: torch.zeros(2, 5, 2, 5, 3)}, ValueError, "locations: .* is needed"),
    ({3: torch.zeros(2, 5, 2, 5)}, ValueError, "locations: .* is needed"),
    ({3: torch.zeros(2, 5, 2, 5, 2).double()}, TypeError, "locations: Float is needed"),
    ({4: torch.zeros(2, 5, 2, 4)}, ValueError, "weights: .* is needed"),
    ({4: torch.zeros(2, 5, 2, 5).half()}, TypeError, "weights: .* is needed"),
]


@pytest.mark.parametrize("changed, error, text", BAD, ids=range(len(BAD)))
def test_the_operators_never_read_beyond_their_tensors(changed, error, text):
    """Exported programs come here directly, without the checks of the Python function."""
    problem = random_problem().to(torch.float32)
    arguments = list(problem.flat_arguments)
    for position, argument in changed.items():
        arguments[position] = argument
    with pytest.raises(error, match=f"^{text}"):
        operators.forward(*arguments)
    with pytest.raises(error, match=f"^{text}"):
        operators.backward(problem.gradient, *arguments)


@pytest.mark.parametrize("change", [lambda g: g[:, :4], lambda g: g.double(), lambda g: g[0]])
def test_a_gradient_that_does_not_fit_is_refused(change):
    problem = random_problem().to(torch.float32)
    with pytest.raises(ValueError, match="^gradient: size, type and device of the output are need"):
        operators.backward(change(problem.gradient), *problem.flat_arguments)


def test_a_set_that_this_cpu_lacks_is_refused():
    with pytest.raises(ValueError, match="this CPU and build have .*generic, not avx1024$"):
        extension.cpu_instructions("avx1024")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")
@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="/proc/cpuinfo says what there is")
@pytest.mark.parametrize("name, flags", [("avx2", {"avx2", "fma"}), ("avx512", {"avx512f"})])
def test_sets_are_there_where_the_cpu_has_them(name, flags):
    with open("/proc/cpuinfo") as file:
        line = next(line for line in file if line.startswith("flags"))
    if not flags <= set(line.split()):
        with pytest.raises(ValueError, match=f"not {name}$"):
            extension.cpu_instructions(name)
    else:
        assert extension.cpu_instructions(name) == name


@pytest.mark.parametrize("name, printed", [("generic", "generic"), ("abacus", "not abacus")])
def test_the_environment_names_a_set(name, printed):
    code = "from dn_detr.layers.deformable import extension; print(extension.cpu_instructions())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DN_DETR_CPU_INSTRUCTIONS": name},
        capture_output=True,
        text=True,
    )
    assert (done.stdout or done.stderr).strip().endswith(printed)


def test_large_results_are_ordinary_tensors():
    """Beyond 32 MiB they have memory of their own kind."""
    value = torch.zeros(1, 2**18 + 1, 1, 33)
    locations, weights = torch.full((1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1)
    gradient, _, _ = operators.backward(
        torch.ones(1, 1, 33), value, [2**18 + 1, 1], [1], locations, weights
    )
    assert gradient.nbytes > 2**25
    torch.testing.assert_close(gradient.sum(), torch.tensor(33.0))  # the rest is zero
    gradient.resize_(2 * gradient.numel())
    gradient.untyped_storage().resize_(0)
