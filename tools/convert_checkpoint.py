#!/usr/bin/env python
"""Converts published checkpoints of the DN-DETR family; nothing in them is run.

Takes what IDEA-Research publishes: of the repository

    DN-DETR     dn_dab_detr, dn_dab_deformable_detr (v2), the deformable encoder only, and its DINO
    DAB-DETR    dab_detr, dab_deformable_detr
    DINO        4scale with a ResNet
    detrex      dn_detr, dab_detr, dn_deformable_detr, dab_deformable_detr, dino (four levels)

The format is told by the names in the file; should it not fit the config, the right one is named.
The 80 used class rows of 91 are kept:

    python tools/convert_checkpoint.py checkpoint.pth dn_detr_r50.pth \\
        --config-file projects/dn_detr/configs/dn_detr_r50_50ep.py

All 91 rows, class = COCO category id, as published:

    python tools/convert_checkpoint.py checkpoint.pth dn_detr_r50_91.pth \\
        --config-file projects/dn_detr/configs/dn_detr_r50_50ep.py model.num_classes=91

OUTPUT may end in .safetensors, too. Then evaluate it:

    python tools/train_net.py --config-file projects/dn_detr/configs/dn_detr_r50_50ep.py \\
        --eval-only train.init_checkpoint=dn_detr_r50.pth

Without --config-file, writes the weights of a training of this project, with the names of the
classes and without the state of the optimizer; with --averaged those of train.ema:

    python tools/convert_checkpoint.py output/model_final.pth weights.safetensors
"""

import argparse
import sys

from dn_detr.checkpoint.convert import convert_file
from dn_detr.checkpoint.export import export_weights
from dn_detr.engine.config import load_config


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="the published file, or one of ours")
    parser.add_argument("output", metavar="OUTPUT", help="to write (.pth, .safetensors)")
    parser.add_argument("--config-file", help="to convert: config of the model it is for")
    parser.add_argument("--averaged", action="store_true", help="export the averaged weights")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the config")
    args = parser.parse_intermixed_args()
    if args.averaged and args.config_file:
        parser.error("--averaged is for files of this project: without --config-file")
    if args.opts and not args.config_file:
        parser.error(f"{' '.join(args.opts)}: overrides need a --config-file")
    try:
        if not args.config_file:
            print(export_weights(args.source, args.output, args.averaged))
            return 0
        cfg = load_config(args.config_file, args.opts)
        print(convert_file(args.source, args.output, cfg, args.config_file))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
