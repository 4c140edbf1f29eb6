#!/usr/bin/env python
r"""Checks COCO-format data as training does, and shows what is in it.

An annotation file and the folder of its images; the first pair is the one to train on, and the
others must have its categories:

    python tools/check_dataset.py train.json train val.json val

The two sets of a config, with values of the config behind it:

    python tools/check_dataset.py --config-file CONFIG dataset.train.json=train.json

Every image opened too, by four processes, and everything written down, with pictures:

    python tools/check_dataset.py train.json train --open-images --workers 4 --output DIR

An ERROR stops a training; a WARNING is what training repairs (--strict: an error); a NOTE is worth
knowing. The exit status is 1 if there is an ERROR, else 0.
"""

import argparse
import os
import sys

from dn_detr.data.inspection import CocoSet, inspect_sets


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sets",
        nargs="*",
        metavar="ANNOTATIONS.json IMAGES",
        help="pairs of annotation file and image folder; with --config-file: key=value",
    )
    parser.add_argument("--config-file", help="check dataset.train and dataset.val of this config")
    parser.add_argument("--open-images", action="store_true", help="open and decode every image")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that open images; 0: this one (default %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="what would be repaired is an error")
    parser.add_argument("--output", metavar="DIR", help="write faults, summary and pictures there")
    parser.add_argument("--all", action="store_true", help="print every culprit, not ten of a kind")
    args = parser.parse_args(argv)
    if not args.config_file and (not args.sets or len(args.sets) % 2):
        parser.error("pairs are needed: ANNOTATIONS.json IMAGES, or --config-file CONFIG")
    if args.workers < 0:
        parser.error("--workers: 0 or more")
    return args


def sets_of_config(path: str, overrides: list[str], strict: bool) -> list[CocoSet]:
    """What a training by this config reads."""
    from dn_detr.engine.config import load_config  # needs detectron2; the rest does not

    cfg = load_config(path, overrides)
    strict = strict or bool(cfg.dataloader.train.dataset.get("strict"))
    return [
        CocoSet(cfg.dataset[split].json, cfg.dataset[split].images, strict, cfg.model.num_classes)
        for split in ("train", "val")
    ]


def main(argv=None) -> bool:
    args = parse_args(argv)
    if args.config_file:
        sets = sets_of_config(args.config_file, args.sets, args.strict)
    else:
        pairs = zip(args.sets[::2], args.sets[1::2])
        sets = [CocoSet(json, images, args.strict) for json, images in pairs]
    shown = None if args.all else 10
    return inspect_sets(sets, args.open_images, args.workers, args.output, shown)


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
