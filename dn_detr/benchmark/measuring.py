"""Clocks and scales: interleaved times, peak memory, and what this machine can do at best."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

SHORTEST = 0.01  # seconds; faster calls are timed several at a time
LEAST_ROUNDS, MOST_ROUNDS = 3, 50


@dataclass(frozen=True)
class Ceilings:
    """What was reached in this run.

    Args:
        bandwidth: bytes a second, read and written, of a copy of 256 MiB.
        operations: a second, of a float32 matrix product.
    """

    bandwidth: float
    operations: float

    def floor(self, moved: int, operations: int) -> float:
        """Seconds that so many bytes and operations take, at once; caches can be faster."""
        return max(moved / self.bandwidth, operations / self.operations)

    def best(self, other: "Ceilings") -> "Ceilings":
        """Of two measurements: a busy machine looks slower than it is."""
        return Ceilings(
            max(self.bandwidth, other.bandwidth), max(self.operations, other.operations)
        )


def seconds_of(call: Call, number: int, device: torch.device) -> float:
    """Of one of `number` calls in a row; on a GPU its own time."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - start) / number
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(number):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / number


def interleaved(
    calls: Mapping[Hashable, tuple[Call, Call]], device: torch.device, budget: float
) -> dict[Hashable, list[float]]:
    """Times of several calls, taken in turns: what disturbs the machine disturbs all alike.

    Args:
        calls: name -> what to call first, untimed, and the call itself.
        device: that they run on.
        budget: seconds for all of them; at least 3 rounds are made, and at most 50.

    Returns:
        name -> seconds of a call, one for each round.
    """
    numbers = {}
    for name, (prepare, call) in calls.items():
        prepare()
        call()
        once = seconds_of(call, 1, device)
        numbers[name] = max(1, math.ceil(SHORTEST / max(once, 1e-7)))
    times = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        for name, (prepare, call) in calls.items():
            prepare()
            times[name].append(seconds_of(call, numbers[name], device))
    return times


def as_graph(call: Call) -> Call:
    """A CUDA graph of the call: replayed, it takes the kernels' time without the launches'.

    To be called on a stream other than the default one; and a backward pass runs on the stream of
    its forward pass, so that this has to be the same one.
    """
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def machine(device: torch.device) -> str:
    """Name of the GPU, or of the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)", info.read_text(), re.M) if info.exists() else []
    processor = models[0] if models else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads"


def ceilings(device: torch.device) -> Ceilings:
    """Measured by a copy and a matrix product of float32, the best of several."""
    source = torch.rand(2**26, device=device)
    target = torch.empty_like(source)
    size = 8192 if device.type == "cuda" else 1024
    factor = torch.rand(size, size, device=device)
    product = torch.empty_like(factor)

    def best(call: Call) -> float:
        call()
        return min(seconds_of(call, 1, device) for _ in range(7))

    copied = 2 * source.numel() * source.element_size()
    return Ceilings(
        bandwidth=copied / best(lambda: target.copy_(source)),
        operations=2 * size**3 / best(lambda: torch.mm(factor, factor, out=product)),
    )


def extra_memory_cuda(call: Call) -> int:
    """Peak of the memory that a call takes beyond what is there before, its results included."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def extra_memory_cpu(call: Call) -> int:
    """The same for the CPU, as the system sees it; in a process of its own (`in_child`).

    Raises:
        OSError: this is not Linux.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def in_child(module: str, request: Mapping[str, object]) -> dict:
    """Runs `python -m module` on a request, in a process whose heap is new.

    Returns:
        the JSON that it prints in its last line.

    Raises:
        RuntimeError: it failed; with the end of its messages.
    """
    # Large blocks go back to the system at once: memory that malloc keeps would not be counted.
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", module, json.dumps(request)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip()[-2000:] or f"ended with status {done.returncode}"
        raise RuntimeError(f"{module} failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])
