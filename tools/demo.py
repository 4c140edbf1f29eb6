#!/usr/bin/env python
"""Draws what a checkpoint finds on images.

    python tools/demo.py IMAGE_OR_FOLDER... --config-file CONFIG --weights FILE --output DIR

Without --weights: the best checkpoint in the config's train.output_dir. The classes are those that
the checkpoint names.
"""

import argparse
import sys

from dn_detr.engine.config import load_config
from dn_detr.evaluation.pictures import draw_images, score_of
from dn_detr.evaluation.predictor import Predictor, find_images, find_weights


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--config-file", required=True, help="the config of the checkpoint")
    parser.add_argument("--weights", help="a checkpoint of tools/train_net.py or a converted one")
    parser.add_argument("--output", required=True, help="a folder for the pictures")
    parser.add_argument(
        "--threshold", type=score_of, default=0.5, help="lowest score, 0 to 1 (default 0.5)"
    )
    parser.add_argument(
        "--raw", action="store_true", help="not the averaged weights, if there are some"
    )
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY=VALUE", help="values of the config to change"
    )
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config_file, args.opts)
    images = find_images(args.images)
    predictor = Predictor(cfg, find_weights(cfg, args.weights), averaged=not args.raw)
    print(f"Weights: {predictor.source}")
    for path in draw_images(predictor, images, args.output, args.threshold):
        print(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
