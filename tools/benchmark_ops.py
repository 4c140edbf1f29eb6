#!/usr/bin/env python
"""Times multi-scale deformable attention beside the grid_sample form and what else is installed.

    python tools/benchmark_ops.py --quick                          # two cases, a minute
    python tools/benchmark_ops.py --output output/benchmark        # all; a table, JSON and a plot
    python tools/benchmark_ops.py --device cpu --threads 2 --instructions generic,avx2,avx512
    python tools/benchmark_ops.py --device cuda --dtypes float32,bfloat16 --graphs
    python tools/benchmark_ops.py --image 640x640 --batches 1,8    # on images of one's own size

Implementations take turns, and medians are shown: forward, backward alone, and both; peak memory
beyond the inputs, results included; and the floor, in which this machine can move the bytes and do
the operations that no implementation can avoid (a copy and a matrix product are timed before and
after). For encoders, a whole layer too. Other implementations, all for CUDA, are found by import:
the authors' extension (MultiScaleDeformableAttention), detrex, mmcv, and the package `kernels`.
"""

import argparse
import contextlib
import re
import sys

import torch

from dn_detr.benchmark import implementations, measuring, report
from dn_detr.benchmark.cases import PASSES, Case, cases_of, standard_cases
from dn_detr.benchmark.run import TOLERANCES, Plan, measure, measure_layer

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}


def names(allowed=None):
    """Reads a list of names with commas between them."""

    def read(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        wrong = [name for name in found if allowed is not None and name not in allowed]
        if wrong or not found:
            choices = ", ".join(allowed or ())
            raise argparse.ArgumentTypeError(f"{text!r}: one or more of {choices} are needed")
        return found

    return read


def image_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: HxW is needed, such as 800x1333")
    return int(match[1]), int(match[2])


def integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--threads", type=int, help="of torch; default: torch's own choice")
    add("--dtypes", type=names(DTYPES), default=["float32"], help="of values and weights")
    add("--passes", type=names(PASSES), default=list(PASSES))
    add("--instructions", type=names(), default=[], help="also ours with each of these (CPU)")
    add("--cases", default="", help="only cases with this in their name, such as 'decoder'")
    add("--image", type=image_size, metavar="HxW", help="instead of the standard sizes")
    add("--batches", type=integers, default=[1, 2], help="default: 1,2")
    add("--ffn", type=integers, default=[1024, 2048], help="of encoder layers; default: 1024,2048")
    add("--seconds", type=float, default=15.0, help="for the times of one case; default: 15")
    add("--quick", action="store_true", help="11k tokens, 300 queries, batch 1, 3 seconds each")
    add("--no-layers", action="store_true", help="no whole encoder layers")
    add("--no-memory", action="store_true")
    add("--graphs", action="store_true", help="times of CUDA graphs, without launches")
    add("--output", help="folder for benchmark.md, .json and .png")
    return parser.parse_args(argv)


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    cases = cases_of(args.image, args.batches) if args.image else standard_cases()
    cases = [case for case in cases if case.batch in args.batches and args.cases in case.name]
    if args.quick:
        small = min((case.tokens for case in cases), default=0)
        cases = [case for case in cases if case.tokens == small and case.batch == cases[0].batch]
    if not cases:
        raise ValueError(f"no case has {args.cases!r} in its name and a batch of {args.batches}")
    return cases


def make_plan(args: argparse.Namespace) -> Plan:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.graphs and device.type != "cuda":
        raise ValueError("--graphs: only for --device cuda")
    found, missing = implementations.others(device.type)
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}", file=sys.stderr)
    return Plan(
        device=device,
        implementations=found + implementations.own(args.instructions),
        instructions=args.instructions,
        passes=args.passes,
        budget=3.0 if args.quick else args.seconds,
        with_memory=not args.no_memory,
        graphs=args.graphs,
        hidden=args.ffn[:1] if args.quick else args.ffn,
    )


def environment(device: torch.device, ceilings: measuring.Ceilings) -> dict[str, object]:
    return {
        "machine": measuring.machine(device),
        "torch": torch.__version__,
        "bandwidth (copy)": f"{ceilings.bandwidth / 1e9:.1f} GB/s",
        "peak (float32 matrix product)": f"{ceilings.operations / 1e9:.0f} GFLOP/s",
    }


def own_stream():
    """Graphs cannot be made on the default one."""
    return torch.cuda.stream(torch.cuda.Stream())


def measure_all(plan: Plan, cases: list[Case], args: argparse.Namespace) -> list[report.Row]:
    rows = []
    for dtype in (DTYPES[name] for name in args.dtypes):
        for case in cases:
            print(f"{case.name}, batch {case.batch}, {dtype} ...", file=sys.stderr, flush=True)
            rows += measure(plan, case, dtype)
            if not (case.queries or args.no_layers) and dtype in (torch.float32, torch.float64):
                rows += measure_layer(plan, case, dtype)
    return rows


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    plan, cases = make_plan(args), chosen_cases(args)
    before = measuring.ceilings(plan.device)
    with own_stream() if plan.graphs else contextlib.nullcontext():
        rows = measure_all(plan, cases, args)
    ceilings = before.best(measuring.ceilings(plan.device))
    facts = environment(plan.device, ceilings)
    print(report.describe(facts), report.table(rows, ceilings), sep="\n\n")
    if args.output:
        print(*report.write(rows, ceilings, facts, args.output), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
