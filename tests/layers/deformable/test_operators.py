"""The operators as parts of torch: compiled, exported, under autocast, without their kernels."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from dn_detr.layers import multi_scale_deformable_attention
from dn_detr.layers.deformable import operators
from tests.layers.deformable.cases import (
    DTYPES,
    dtype_name,
    random_problem,
    with_gradients,
)


def attend(value, shapes, points, locations, weights):
    return multi_scale_deformable_attention(value, shapes, locations, weights, points)


def check_registrations(problem, value=None, **options):
    """Schema, fake and autograd of both operators: `opcheck`."""
    value = problem.value if value is None else value
    arguments = (value, *problem.flat_arguments[1:])
    torch.library.opcheck(operators.forward, arguments, **options)
    torch.library.opcheck(operators.backward, (problem.gradient, *arguments), **options)


def with_leaves(problem):
    for tensor in (problem.gradient, problem.value, problem.locations, problem.weights):
        tensor.requires_grad_()
    return problem


@pytest.mark.fault(66)
@pytest.mark.parametrize("sizes", [{}, {"queries": 0}, {"batch": 0}], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
def test_registrations_fit_the_kernels(dtypes, sizes):
    quick = ["test_schema", "test_autograd_registration", "test_faketensor"]
    problem = with_leaves(random_problem(**sizes).to(*dtypes))
    check_registrations(problem, test_utils=quick)


@pytest.mark.fault(66)
def test_registrations_fit_the_kernels_in_compiled_programs():
    check_registrations(with_leaves(random_problem(batch=1, channels=2)))


def test_strided_values_give_dense_results_in_compiled_programs_too():
    """What follows in a compiled program relies on the strides that the fake announces."""
    problem = random_problem(channels=8).to(torch.float32)
    part = torch.stack([problem.value] * 3, 2).unbind(2)[1]
    heads_first = problem.value.transpose(1, 2).contiguous().transpose(1, 2)
    for strided in (part, heads_first):
        check_registrations(problem, strided, test_utils=["test_faketensor"])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_compiled_equals_eager(dtype, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seed, sizes in enumerate([{}, dict(batch=3, queries=7, shapes=[(4, 4), (3, 2)])]):
        problem = random_problem(seed=seed, **sizes).to(dtype)
        expected = with_gradients(attend, problem)
        for a, b in zip(with_gradients(compiled, problem), expected):
            assert torch.equal(a, b)


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a compiler, g++")
def test_inductor_equals_eager():
    """With its neighbours fused; they hand over, and take, the strides that the fake announces."""
    torch.compiler.reset()

    def function(value, shapes, points, locations, weights):
        arguments = (2 * value, shapes, points, locations + 0.1, weights.softmax(-1))
        return attend(*arguments).relu()

    problem = random_problem(channels=8).to(torch.float32)
    compiled = with_gradients(torch.compile(function, fullgraph=True), problem)
    for a, b in zip(compiled, with_gradients(function, problem)):
        torch.testing.assert_close(a, b)


def test_dynamic_shapes_compile_once():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    for side in (5, 6, 9):
        problem = random_problem(
            [(side, side + 1), (7, side + 7)], batch=side + 20, queries=side + 9
        )
        torch.testing.assert_close(compiled(*problem.arguments), attend(*problem.arguments))
    assert len(graphs) == 1


class Attention(nn.Module):
    def forward(self, value, locations, weights):
        return multi_scale_deformable_attention(value, [(6, 5), (3, 4)], locations, weights, (3, 2))


def test_an_exported_program_has_one_node_of_the_operation():
    problem = random_problem().to(torch.float32)
    batch, queries = torch.export.Dim("batch"), torch.export.Dim("queries")
    dynamic = {0: batch, 1: queries}
    program = torch.export.export(
        Attention(),
        (problem.value, problem.locations, problem.weights),
        dynamic_shapes={"value": {0: batch}, "locations": dynamic, "weights": dynamic},
    )
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(operators.forward) == 1
    problem = random_problem(batch=5, queries=9, seed=1).to(torch.float32)
    actual = program.module()(problem.value, problem.locations, problem.weights)
    assert torch.equal(actual, attend(*problem.arguments))


@pytest.mark.parametrize("dtypes", DTYPES[2:], ids=lambda pair: "-".join(map(dtype_name, pair)))
def test_autocast_lowers_the_value_only(dtypes):
    dtype, weight_dtype = dtypes
    lowered = random_problem(channels=8).to(dtype, weight_dtype)
    problem = replace(lowered, value=random_problem(channels=8).value.float())

    def attend_in_autocast(*arguments):
        with torch.autocast("cpu", dtype):
            return attend(*arguments)

    results = with_gradients(attend_in_autocast, problem)
    assert [x.dtype for x in results] == [dtype, torch.float32, torch.float32, weight_dtype]
    for a, b in zip(results, with_gradients(attend, lowered)):
        assert torch.equal(a, b.to(a.dtype))


def test_autocast_takes_weights_of_no_third_dtype():
    problem = random_problem().to(torch.float32, torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="^weights: torch.bfloat16 or torch.float32 is needed "):
            attend(*problem.arguments)


def test_autocast_leaves_float64_alone():
    problem = random_problem()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*problem.arguments), attend(*problem.arguments))
        assert attend(*problem.arguments).dtype == torch.float64


def test_autocast_takes_values_that_are_already_low():
    problem = random_problem().to(torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*problem.arguments[:4], problem.weights.float()).dtype == torch.bfloat16


WITHOUT_EXTENSION = """
import sys
sys.modules["dn_detr._C"] = None  # importing it raises ImportError
import torch
from dn_detr.layers import multi_scale_deformable_attention
from dn_detr.layers.deformable import extension
from tests.layers.deformable.cases import assert_results, random_problem, with_gradients

def attend(value, shapes, points, locations, weights):
    return multi_scale_deformable_attention(value, shapes, locations, weights, points)

assert not extension.has_kernel("cpu")
for dtype in (torch.float32, torch.bfloat16):
    problem = random_problem().to(dtype)
    assert_results(with_gradients(attend, problem), problem)
try:
    extension.cpu_instructions()
except RuntimeError as error:
    print(error)
"""


@pytest.mark.fault(66)
def test_without_the_extension_plain_pytorch_serves_and_one_line_says_so():
    command = [sys.executable, "-c", WITHOUT_EXTENSION]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("Multi-scale deformable attention on cpu runs in plain PyTorch, many t")
    assert "the extension dn_detr._C: it was not built. To build it: pip install" in line
    assert done.stdout.startswith("dn_detr._C is missing: it was not built. To build it: pip inst")


def test_forward_mode_is_that_of_the_reference():
    problem = random_problem()
    tensors = problem.value, problem.locations, problem.weights
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)

    def call(value, locations, weights):
        return attend(value, problem.shapes, problem.points, locations, weights)

    output, derivative = torch.func.jvp(call, tensors, tangents)
    torch.testing.assert_close(output, call(*tensors))
    step = 1e-6
    ahead, behind = (
        call(*(t + sign * step * d for t, d in zip(tensors, tangents))) for sign in (1, -1)
    )
    expected = (ahead - behind) / (2 * step)
    torch.testing.assert_close(derivative, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_program_gives_the_same():
    """fvcore's flop counter traces, where sizes are tensors."""

    class Attention(nn.Module):
        def forward(self, value, image, locations, weights):
            return multi_scale_deformable_attention(value, [image.shape[-2:]], locations, weights)

    inputs = (
        torch.randn(2, 12, 2, 4),
        torch.zeros(2, 3, 4),
        torch.rand(2, 5, 2, 1, 3, 2),
        torch.rand(2, 5, 2, 1, 3),
    )
    traced = torch.jit.trace(Attention(), inputs)
    torch.testing.assert_close(traced(*inputs), Attention()(*inputs))
