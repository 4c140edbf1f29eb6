#!/usr/bin/env python
"""Draws loss and AP curves of one training, or of several over one another.

    python tools/plot_metrics.py output/demo/metrics.json --output curves.png
    python tools/plot_metrics.py "with=output/a" "without=output/b" --output curves.png

A training is named by its metrics.json or its folder; LABEL= in front names it in the legend.
"""

import argparse
import sys
from pathlib import Path

from dn_detr.evaluation.plots import plot_curves


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]METRICS_JSON_OR_FOLDER")
    parser.add_argument("--output", required=True, help="the PNG to write")
    return parser.parse_args(argv)


def label_and_file(run: str) -> tuple[str, Path]:
    label, separator, path = run.partition("=")
    if not separator or Path(run).exists():
        label, path = run, run
    file = Path(path)
    return label, file / "metrics.json" if file.is_dir() else file


def main() -> None:
    args = parse_args()
    runs = dict(label_and_file(run) for run in args.runs)
    if len(runs) < len(args.runs):
        raise ValueError("two trainings have the same label")
    plot_curves(runs, args.output)
    print(args.output)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
