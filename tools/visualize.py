#!/usr/bin/env python
"""Draws predictions beside the ground truth, for some validation images of a config.

    python tools/visualize.py --config-file CONFIG --weights FILE --output DIR

Without --weights: the best checkpoint in the config's train.output_dir.
"""

import argparse
import sys

from dn_detr.engine.config import load_config, resolve_config
from dn_detr.evaluation.pictures import draw_validation, score_of
from dn_detr.evaluation.predictor import Predictor, find_weights


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the config of the checkpoint")
    parser.add_argument("--weights", help="a checkpoint of tools/train_net.py or a converted one")
    parser.add_argument("--output", required=True, help="a folder for the pictures")
    parser.add_argument("--num-images", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the images (default 0)")
    parser.add_argument(
        "--threshold", type=score_of, default=0.5, help="lowest score, 0 to 1 (default 0.5)"
    )
    parser.add_argument(
        "--raw", action="store_true", help="not the averaged weights, if there are some"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="values of the config")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config_file, args.opts)
    resolve_config(cfg, eval_only=True)  # makes built-in data that is not there yet
    predictor = Predictor(cfg, find_weights(cfg, args.weights), averaged=not args.raw)
    print(f"Weights: {predictor.source}")
    sheet = draw_validation(cfg, predictor, args.output, args.num_images, args.threshold, args.seed)
    print(f"{sheet} (and one picture for each image beside it)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
