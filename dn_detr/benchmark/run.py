"""Measures cases one after the other: equality first, then times, then memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dn_detr.benchmark import encoder_layer, measuring, memory
from dn_detr.benchmark.cases import PASSES, Case, Inputs, least_work
from dn_detr.benchmark.implementations import GRID_SAMPLE, OURS, Implementation
from dn_detr.benchmark.report import Row

# Of the largest output; a round-off of inputs in low precision, positions in float32.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
MEASURED_MEMORY = ("forward", "forward+backward")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        implementations: the first is the one that the others must equal.
        instructions: that `implementations` have rows for, see `implementations.own`.
        passes: of `cases.PASSES`.
        budget: seconds for the times of one case.
        with_memory: whether peak memory is measured (on the CPU: a process for each row).
        graphs: on a GPU, times of CUDA graphs.
        hidden: widths of the feed-forward networks of encoder layers.
    """

    device: torch.device
    implementations: Sequence[Implementation]
    instructions: Sequence[str] = ()
    passes: Sequence[str] = PASSES
    budget: float = 15.0
    with_memory: bool = True
    graphs: bool = False
    hidden: Sequence[int] = field(default=(1024,))


def measure(plan: Plan, case: Case, dtype: torch.dtype) -> list[Row]:
    """Rows of the operation in one case.

    Raises:
        ValueError: implementations do not agree.
    """
    inputs = case.inputs(dtype, plan.device)
    check_equal(plan.implementations, inputs)
    peaks = _peaks(plan, case, dtype, inputs) if plan.with_memory else {}
    calls = {
        (passes, i.name): (i.prepare, i.call(inputs, passes))
        for passes in plan.passes
        for i in plan.implementations
    }
    work = {passes: least_work(inputs, passes) for passes in plan.passes}
    return [
        Row(
            *(case.name, case.batch, _name(dtype), passes, name, times),
            *(work[passes].moved, work[passes].operations, work[passes].results),
            peaks.get((passes, name)),
        )
        for (passes, name), times in _times(plan, calls).items()
    ]


def measure_layer(plan: Plan, case: Case, dtype: torch.dtype) -> list[Row]:
    """Rows of a whole encoder layer, for every width of its feed-forward network."""
    rows = []
    for hidden in plan.hidden:
        problem = encoder_layer.LayerProblem.make(case, hidden, dtype, plan.device)
        calls = {
            (passes, name): (lambda: None, problem.call(name, passes))
            for passes in encoder_layer.PASSES
            for name in (GRID_SAMPLE, OURS)
        }
        for (passes, name), times in _times(plan, calls).items():
            operations = problem.least_operations(passes)
            common = (problem.name, case.batch, _name(dtype), passes, name)
            rows.append(Row(*common, times, moved=0, operations=operations))
    return rows


def check_equal(implementations: Sequence[Implementation], inputs: Inputs) -> None:
    """
    Raises:
        ValueError: an output differs from that of the first implementation.
    """
    expected = None
    for implementation in implementations:
        implementation.prepare()
        output = implementation.forward(inputs).double()
        expected = output if expected is None else expected
        error = ((output - expected).abs().max() / expected.abs().max()).item()
        if not error <= TOLERANCES[inputs.value.dtype]:
            raise ValueError(
                f"{implementation.name} differs from {implementations[0].name} by {error:.1e} of "
                "the largest output: times of different results are not compared"
            )


def _times(plan: Plan, calls: dict) -> dict[tuple[str, str], list[float]]:
    if plan.graphs:
        calls = {name: (prepare, measuring.as_graph(c)) for name, (prepare, c) in calls.items()}
    return measuring.interleaved(calls, plan.device, plan.budget)


def _peaks(plan: Plan, case: Case, dtype: torch.dtype, inputs: Inputs) -> dict[tuple, int]:
    """(pass, implementation) -> bytes"""
    passes = [name for name in MEASURED_MEMORY if name in plan.passes]
    peaks = {}
    for implementation in plan.implementations:
        if plan.device.type == "cuda":
            found = {
                name: measuring.extra_memory_cuda(implementation.call(inputs, name))
                for name in passes
            }
        else:
            found = memory.measure(implementation.name, case, dtype, passes, plan.instructions)
        peaks |= {(name, implementation.name): size for name, size in found.items()}
    return peaks


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
