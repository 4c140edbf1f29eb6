#!/usr/bin/env python
"""Measures the memory that denoising takes in a training step, from the published way to ours.

    python tools/benchmark_denoising.py                            # DN-DETR's decoder, four crowds
    python tools/benchmark_denoising.py --objects 10,100 --budgets 500 --output output/denoising
    python tools/benchmark_denoising.py --device cuda --batch 2

A step is forward pass, losses and backward pass of what is behind the encoder of DN-DETR with
ResNet-50. The published way has a fixed number of groups, holds all attention weights, and takes
the GIoU loss off the diagonal of a matrix of all pairs; every other row changes one thing. Ways
take turns. Peaks are beyond model, gradients and input; on the CPU each is measured in a process of
its own. Large crowds take several GB in the published way; what fails for want of memory is left
out.
"""

import argparse
import re
import sys

import torch

from dn_detr.benchmark import denoising, measuring, report


def integers(text: str) -> list[int]:
    """Numbers with commas between them."""
    if re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers are needed, such as 10,100")
    return [int(number) for number in text.split(",")]


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--threads", type=int, help="of torch; default: torch's own choice")
    add("--objects", type=integers, default=[10, 100, 300, 500], help="in every image")
    add("--batch", type=int, default=1, help="images; default: 1")
    add("--layers", type=int, default=6, help="of the decoder; default: 6")
    add("--groups", type=int, default=5, help="default: 5")
    add("--budgets", type=integers, default=[500, 100], help="default: 500,100")
    add("--output", help="folder for denoising.md and .json")
    return parser.parse_args(argv)


def measure_all(args: argparse.Namespace, device: torch.device) -> list[denoising.Row]:
    setting = denoising.Setting(batch=args.batch, layers=args.layers)
    rows = []
    for objects in args.objects:
        for way in denoising.ways(args.groups, args.budgets):
            print(f"{objects} objects, {way.name} ...", file=sys.stderr, flush=True)
            try:
                rows.append(denoising.measure(way, setting, objects, device))
            except RuntimeError as error:
                print(f"not measured: {error}", file=sys.stderr)
    return rows


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = measure_all(args, device)
    facts = {
        "machine": measuring.machine(device),
        "torch": torch.__version__,
        "batch": args.batch,
        "decoder layers": args.layers,
    }
    print(report.describe(facts), denoising.table(rows), sep="\n\n")
    if args.output:
        print(*denoising.write(rows, facts, args.output), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
