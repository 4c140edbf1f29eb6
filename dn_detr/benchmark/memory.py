"""Peak memory of one implementation on the CPU; `measure` starts this file in its own process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from dn_detr.benchmark import measuring
from dn_detr.benchmark.cases import Case
from dn_detr.benchmark.implementations import GRID_SAMPLE, Implementation, grid_sample, own


def measure(
    name: str, case: Case, dtype: torch.dtype, passes: Sequence[str], instructions: Sequence[str]
) -> dict[str, int]:
    """Peak extra memory on the CPU.

    Args:
        name: of an implementation, ours or the grid_sample form.
        instructions: as for `implementations.own`.

    Returns:
        pass -> bytes, results included.
    """
    request = {
        "name": name,
        "case": asdict(case),
        "dtype": str(dtype).removeprefix("torch."),
        "passes": list(passes),
        "instructions": list(instructions),
        "threads": torch.get_num_threads(),
    }
    return measuring.in_child(__name__, request)


def _serve(request: dict) -> dict[str, int]:
    torch.set_num_threads(request["threads"])
    known = {i.name: i for i in own(request["instructions"])}
    known[GRID_SAMPLE] = Implementation(GRID_SAMPLE, grid_sample)
    implementation = known[request["name"]]
    implementation.prepare()
    dtype, cpu = getattr(torch, request["dtype"]), torch.device("cpu")
    tiny = Case("first calls", (64, 64)).inputs(dtype, cpu)
    inputs = Case(**request["case"]).inputs(dtype, cpu)
    peaks = {}
    for passes in request["passes"]:
        implementation.call(tiny, passes)()  # threads and libraries have memory of their own
        peaks[passes] = measuring.extra_memory_cpu(implementation.call(inputs, passes))
    return peaks


if __name__ == "__main__":
    print(json.dumps(_serve(json.loads(sys.argv[1]))))
