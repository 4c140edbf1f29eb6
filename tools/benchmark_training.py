#!/usr/bin/env python
"""Measures time and memory of a training step of a config, under several sets of overrides.

    python tools/benchmark_training.py --config-file CONFIG \\
        --variant "as it is" \\
        --variant "checkpointing: model.encoder.activation_checkpointing=True"

A step is forward pass, losses and backward pass on random images; the variants take turns. Ratios
are to the first variant. Memory is the peak beyond model, gradients and images; on the CPU it is
measured in a process of its own.
"""

import argparse
import sys

import torch

from dn_detr.benchmark import measuring, report
from dn_detr.benchmark.training_step import Step, measure, table


def variant(text: str) -> tuple[str, tuple[str, ...]]:
    """NAME, or NAME: key=value ..."""
    name, _, overrides = text.partition(":")
    return name.strip(), tuple(overrides.split())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, help="the config of all variants")
    add("--variant", type=variant, action="append", help='"NAME: key=value ...", repeatedly')
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--threads", type=int, help="of torch; default: torch's own choice")
    add("--batch", type=int, default=2, help="images; default: 2")
    add("--size", type=int, nargs=2, default=[480, 640], metavar=("H", "W"), help="of the images")
    add("--objects", type=int, default=10, help="in every image; default: 10")
    add("--seconds", type=float, default=60, help="for all times; at least 3 rounds are made")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    steps = {
        name: Step(args.config_file, overrides, args.batch, *args.size, args.objects)
        for name, overrides in args.variant or [("as it is", ())]
    }
    facts = {
        "machine": measuring.machine(device),
        "torch": torch.__version__,
        "config": args.config_file,
        "images": f"{args.batch} of {args.size[0]} x {args.size[1]}, {args.objects} objects each",
    }
    print(report.describe(facts), table(measure(steps, device, args.seconds)), sep="\n\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
