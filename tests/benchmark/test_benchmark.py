"""The benchmark of deformable attention: what it counts and compares. No times are tested."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from dn_detr.benchmark import implementations, measuring, memory, report
from dn_detr.benchmark.cases import (
    Case,
    cases_of,
    least_work,
    sampled_pixels,
    standard_cases,
)
from dn_detr.benchmark.encoder_layer import PASSES as LAYER_PASSES
from dn_detr.benchmark.encoder_layer import LayerProblem
from dn_detr.benchmark.implementations import GRID_SAMPLE, OURS, Classic, Implementation
from dn_detr.benchmark.run import check_equal
from dn_detr.layers.deformable import extension, reference

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")
SMALL = Case("small", (64, 96), batch=2)
ON_GRID_SAMPLE = Implementation(GRID_SAMPLE, implementations.grid_sample)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def test_cases_have_the_published_sizes() -> None:
    sizes = {case.name: (case.tokens, case.queries) for case in standard_cases()}
    assert sizes == {
        "encoder 11k": (11_177, 0),
        "encoder 22k": (22_223, 0),
        "decoder 300": (11_177, 300),
        "decoder 900": (22_223, 900),
    }
    assert standard_cases()[2].shapes == ((100, 167), (50, 84), (25, 42), (13, 21))
    assert [case.batch for case in cases_of((64, 64), [1, 8])] == [1, 8] * 3


@pytest.mark.parametrize("queries", [0, 300])
def test_points_lie_some_pixels_around_their_reference(queries: int) -> None:
    inputs = Case("some", (256, 320), queries=queries).inputs(torch.bfloat16, CPU)
    assert inputs.value.dtype == inputs.weights.dtype == torch.bfloat16
    assert inputs.locations.dtype == torch.float32
    sizes = torch.tensor([(width, height) for height, width in inputs.shapes])
    offsets = (inputs.locations - inputs.locations.mean(dim=(2, 4), keepdim=True)) * sizes[:, None]
    for level in range(4):
        assert offsets[:, :, :, level].std().item() == pytest.approx(3, rel=0.05)


def test_encoder_queries_start_at_their_own_pixel() -> None:
    case = Case("encoder", (64, 96))
    locations = case.inputs(torch.float32, CPU).locations
    assert locations.shape[1] == case.tokens == 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    expected = torch.tensor([(1 + 0.5) / 12, (7 + 0.5) / 8])  # row 7, column 1 of the first level
    mean = locations[0, 7 * 12 + 1].mean(dim=(0, 2))[0]
    torch.testing.assert_close(mean, expected, atol=0.2, rtol=0)


def test_work_counts_what_is_sampled() -> None:
    """A pixel counts if its gradient is not zero; there, every part of it is stored."""
    inputs = Case("decoder", (256, 256), batch=2, queries=3).inputs(torch.float32, CPU)
    ((value_gradient, _, _)) = ON_GRID_SAMPLE.call(inputs, "forward+backward")()
    touched = int((value_gradient != 0).any(-1).sum())
    assert sampled_pixels(inputs) == touched
    assert touched < inputs.value.shape[:3].numel()

    samples = 2 * 3 * 8 * 4 * 4
    points, output, pixels = samples * 3 * 4, 2 * 3 * 256 * 4, touched * 32 * 4
    forward, backward = least_work(inputs, "forward"), least_work(inputs, "backward")
    assert forward.moved == pixels + points + output
    assert forward.operations == samples * 32 * 4 * 2
    assert forward.results == output
    gradients = inputs.value.numel() * 4 + points
    assert backward.moved == forward.moved + pixels + gradients
    assert backward.operations == 2 * forward.operations
    assert least_work(inputs, "forward+backward").moved == forward.moved + backward.moved


def test_calls_take_turns() -> None:
    calls, log = {}, []
    for name in "ab":
        calls[name] = (partial(log.append, f"prepare {name}"), partial(log.append, name))
    times = measuring.interleaved(calls, CPU, budget=0.0)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    turns = [entry for i, entry in enumerate(log) if i == 0 or entry != log[i - 1]]
    assert turns == ["prepare a", "a", "prepare b", "b"] * 4  # untimed calls, then three rounds


@needs_linux
def test_peak_memory_is_that_of_the_call() -> None:
    def call() -> Tensor:
        torch.ones(2**24)  # 64 MiB, gone again
        return torch.ones(2**23)

    assert measuring.extra_memory_cpu(call) == pytest.approx(2**26, rel=0.1)


@needs_linux
def test_peak_memory_of_an_implementation() -> None:
    """The grid_sample form holds every sample, and takes its share of them."""
    case = Case("some", (256, 256))
    peaks = memory.measure(GRID_SAMPLE, case, torch.float32, ["forward", "forward+backward"], [])
    samples = 4 * case.inputs(torch.float32, CPU).weights.numel() * 32
    assert samples < peaks["forward"] < 4 * samples
    assert peaks["forward"] < peaks["forward+backward"]


def test_a_failing_child_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="dn_detr.benchmark.memory failed: (.|\n)*KeyError"):
        measuring.in_child("dn_detr.benchmark.memory", {})


def test_ceilings() -> None:
    ceilings = measuring.Ceilings(bandwidth=1e9, operations=1e11)
    assert ceilings.floor(moved=2 * 10**9, operations=10**11) == 2.0
    assert ceilings.floor(moved=10**9, operations=3 * 10**11) == 3.0
    assert ceilings.best(measuring.Ceilings(2e9, 1e10)) == measuring.Ceilings(2e9, 1e11)


def test_different_results_are_not_compared() -> None:
    inputs = SMALL.inputs(torch.float32, CPU)
    others, _ = implementations.others("cpu")
    check_equal(others + implementations.own(), inputs)
    wrong = Implementation("wrong", lambda *a: implementations.grid_sample(*a) * 1.001)
    with pytest.raises(ValueError, match=r"wrong differs from grid_sample by 1.0e-03"):
        check_equal([ON_GRID_SAMPLE, wrong], inputs)
    broken = Implementation("broken", lambda *a: implementations.grid_sample(*a) * float("nan"))
    with pytest.raises(ValueError, match="broken differs from grid_sample by nan"):
        check_equal([ON_GRID_SAMPLE, broken], inputs)


@pytest.mark.parametrize("passes", ["forward", "backward", "forward+backward"])
def test_calls_of_ours_and_of_the_grid_sample_form(passes: str) -> None:
    inputs = SMALL.inputs(torch.float64, CPU)
    (ours,) = implementations.own()
    call = ours.call(inputs, passes)
    for _ in range(2):  # a backward pass can be repeated
        torch.testing.assert_close(call(), ON_GRID_SAMPLE.call(inputs, passes)())


def test_instruction_sets() -> None:
    if extension.MISSING:
        with pytest.raises(RuntimeError, match="dn_detr._C is missing"):
            implementations.own(["generic"])
        return
    best = extension.cpu_instructions()
    first, generic = implementations.own(["generic"])
    assert [first.name, generic.name] == [OURS, "ours, generic"]
    generic.prepare()
    assert extension.cpu_instructions() == "generic"
    first.prepare()
    assert extension.cpu_instructions() == best


class ClassicModule:
    """Stands in for the authors' extension: its interface, on the reference."""

    def _arguments(self, value: Tensor, sizes: Tensor, starts: Tensor, *rest: Tensor) -> tuple:
        locations, weights = rest
        assert starts.tolist() == [0, 96, 120, 126]
        shapes = [tuple(size) for size in sizes.tolist()]
        points = [locations.shape[4]] * len(shapes)
        return value, shapes, points, locations.flatten(3, 4), weights.flatten(3)

    def ms_deform_attn_forward(self, *arguments) -> Tensor:
        assert arguments[-1] == 2  # the batch in one step
        return reference.by_sampling(*self._arguments(*arguments[:-1]))

    def ms_deform_attn_backward(self, *arguments) -> list[Tensor]:
        *inputs, gradient, step = arguments
        assert step == 2 and gradient.is_contiguous()
        gradients = reference.by_sampling_backward(gradient, *self._arguments(*inputs))
        like = (inputs[0], *inputs[3:])
        return [gradient.view_as(tensor) for gradient, tensor in zip(gradients, like)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_with_the_authors_interface(dtype: torch.dtype) -> None:
    inputs = SMALL.inputs(dtype, CPU)
    classic = Classic(partial(implementations.ClassicFunction.apply, ClassicModule()))
    own = Implementation("classic", classic)
    check_equal([ON_GRID_SAMPLE, own], inputs)
    found = own.call(inputs, "forward+backward")()
    assert found[0].dtype == dtype
    tolerance = dict(rtol=0.02, atol=0.02) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(
        found, ON_GRID_SAMPLE.call(inputs, "forward+backward")(), **tolerance
    )


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str):
        if name == "detrex._C":
            return SimpleNamespace()  # a build without the operation
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", import_module)
    found, missing = implementations.others("cuda")
    assert [implementation.name for implementation in found] == [GRID_SAMPLE]
    assert missing["mmcv's operation"] == "No module named 'mmcv.ops.multi_scale_deform_attn'"
    assert "ms_deform_attn_forward" in missing["detrex's extension"]
    assert len(missing) == 4
    assert implementations.others("cpu")[1] == {}  # all of them are for CUDA


@pytest.mark.parametrize("passes", LAYER_PASSES)
def test_layers_differ_in_nothing_but_the_operation(
    passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = LayerProblem.make(SMALL, 32, torch.float64, CPU)
    ours, sampled = (problem.call(name, passes) for name in (OURS, GRID_SAMPLE))
    torch.testing.assert_close(ours(), sampled())
    monkeypatch.setattr(reference, "by_sampling", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampled()


def test_operations_of_a_layer() -> None:
    """A product and a sum for each number of its matrices and each token; twice more backward."""
    problem = LayerProblem.make(SMALL, 32, torch.float32, CPU)
    matrices = [p.numel() for p in problem.layer.parameters() if p.dim() == 2]
    tokens = 2 * SMALL.tokens
    assert problem.least_operations("forward") == 2 * tokens * sum(matrices)
    assert problem.least_operations("forward+backward") == 6 * tokens * sum(matrices)


def rows() -> list[report.Row]:
    common = ("encoder", 1, "float32", "forward")
    return [
        report.Row(*common, GRID_SAMPLE, [0.3, 0.1, 0.2], 10**6, 10**6, 2**20, 2**24),
        report.Row(*common, OURS, [0.01, 0.02, 0.01], 10**6, 10**6, 2**20, 2**21),
        report.Row("layer", 1, "float32", "forward", OURS, [0.5], 0, 10**6),
    ]


def test_table() -> None:
    """Medians, how many times faster than the baseline, beside the floor, and memory."""
    lines = report.table(rows(), measuring.Ceilings(1e9, 1e12)).splitlines()
    assert lines[2:] == [
        "| encoder | 1 | float32 | forward | grid_sample | 200.000 | 1.00 | 200.0 | 16.0 | 1.0 "
        "| 1.000 |",
        "| encoder | 1 | float32 | forward | ours | 10.000 | 20.00 | 10.0 | 2.0 | 1.0 | 0.125 |",
        "| layer | 1 | float32 | forward | ours | 500.000 |  | 500000.0 |  |  |  |",
    ]
    assert {line.count("|") for line in lines} == {12}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_ops", ROOT / "tools/benchmark_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Runs tools/benchmark_ops.py with options."""
    threads = torch.get_num_threads()

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmark_ops.py", *options])
        tool.main()

    yield run
    torch.set_num_threads(threads)


def test_chosen_cases(tool: ModuleType) -> None:
    def chosen(options: str) -> list[tuple[str, int]]:
        cases = tool.chosen_cases(tool.parse_args(options.split()))
        return [(case.name, case.batch) for case in cases]

    assert len(chosen("")) == 8
    assert chosen("--quick") == [("encoder 11k", 1), ("decoder 300", 1)]
    assert chosen("--batches 2 --cases decoder") == [("decoder 300", 2), ("decoder 900", 2)]
    assert chosen("--batches 8 --image 64x64 --cases enc") == [("encoder", 8)]


@needs_linux
def test_script(script, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All of it on images of 32x48 pixels."""
    options = "--image 32x48 --batches 1 --cases encoder --seconds 0.01 --device cpu --threads 1"
    script(*options.split(), "--ffn", "64", "--output", str(tmp_path))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| encoder")]
    assert len(table) == 3 * 2 + 2 * 2  # passes of the operation and of a layer
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(content["rows"]) == len(table)
    assert content["rows"][0]["memory"] > 0
    assert table[0] in (tmp_path / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--cases nothing", "no case has 'nothing' in its name"),
        ("--graphs --device cpu", "--graphs: only for --device cuda"),
        ("--dtypes float8", "'float8': one or more of float64, float32, float16, bfloat16"),
        ("--image 640", "'640': HxW is needed, such as 800x1333"),
    ],
)
def test_script_refuses(script, options: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises((ValueError, SystemExit)) as info:
        script(*options.split())
    assert message in f"{info.value}{capsys.readouterr().err}"
