"""Draws what a model predicts into files: for any image, or beside the ground truth."""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import instantiate  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from PIL import Image  # noqa: E402

from dn_detr.data.categories import DatasetError  # noqa: E402
from dn_detr.evaluation.drawing import (  # noqa: E402
    draw_objects,
    from_annotations,
    from_instances,
    in_rows,
    with_caption,
)
from dn_detr.evaluation.predictor import Predictor, read_rgb  # noqa: E402

logger = logging.getLogger(__name__)

COLUMNS = 2
GAP_OF_PAIRS = 32  # pixels: wide enough to see which two belong together
MAX_SHEET_WIDTH = 2400  # pixels


def score_of(text: str) -> float:
    """A score on a command line.

    Raises:
        argparse.ArgumentTypeError: it is not in 0..1.
    """
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not 0 <= score <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1, such as 0.5")
    return score


def draw_images(
    predictor: Predictor, images: Sequence[Path], output: str | Path, threshold: float
) -> list[Path]:
    """Draws predictions on images.

    Args:
        predictor: of the checkpoint.
        images: files.
        output: the folder for the pictures, made if it does not exist.
        threshold: the lowest score to draw, 0..1.

    Returns:
        the pictures, in the order of `images`, each `NAME.png`; a name that is there twice gets a
        number.

    Raises:
        ValueError: the only image cannot be read; of several, such an image is skipped and named.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for path in images:
        try:
            image = read_rgb(path)
        except ValueError as error:
            if len(images) == 1:
                raise
            logger.warning("skipped: %s", error)  # one bad file in a folder costs no other
            continue
        objects = from_instances(predictor(image), threshold)
        picture = draw_objects(image, objects, predictor.class_names)
        target = folder / f"{path.stem}.png"
        number = 2
        while target in written:
            target = folder / f"{path.stem}_{number}.png"
            number += 1
        Image.fromarray(picture).save(target)
        written.append(target)
    return written


def draw_validation(
    cfg: DictConfig,
    predictor: Predictor,
    output: str | Path,
    num_images: int = 8,
    threshold: float = 0.5,
    seed: int = 0,
) -> Path:
    """Draws ground truth and predictions side by side, for some of the validation images.

    Args:
        cfg: whose `dataloader.test.dataset` names the images.
        predictor: of the checkpoint.
        output: a folder; gets one PNG an image, and all of them in `predictions.png`.
        num_images: how many; the same ones for the same seed.
        threshold: the lowest score to draw, 0..1.
        seed: chooses the images.

    Returns:
        the picture that holds all.

    Raises:
        DatasetError: there are no validation images.
    """
    cfg = cfg.copy()
    cfg.model.num_classes = len(predictor.class_names)
    entries = instantiate(cfg.dataloader.test.dataset)
    if not entries:
        raise DatasetError(f"{cfg.dataset.val.json} holds no images to draw")
    chosen = random.Random(seed).sample(entries, min(num_images, len(entries)))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    for entry in chosen:
        pairs.append(_draw_pair(entry, predictor, threshold))
        Image.fromarray(pairs[-1]).save(folder / f"{Path(entry['file_name']).stem}.png")
    sheet = Image.fromarray(in_rows(pairs, COLUMNS, gap=GAP_OF_PAIRS))
    sheet.thumbnail((MAX_SHEET_WIDTH, MAX_SHEET_WIDTH * len(pairs)))
    sheet.save(folder / "predictions.png")
    return folder / "predictions.png"


def _draw_pair(entry: dict, predictor: Predictor, threshold: float) -> np.ndarray:
    image = read_rgb(entry["file_name"])
    truth = from_annotations(entry["annotations"])
    found = from_instances(predictor(image), threshold)
    left = draw_objects(image, truth, predictor.class_names)
    right = draw_objects(image, found, predictor.class_names)
    name = Path(entry["file_name"]).name
    left = with_caption(left, f"{name}: ground truth ({len(truth.classes)})")
    right = with_caption(right, f"predictions of {threshold:.0%} and more ({len(found.classes)})")
    return in_rows([left, right], 2)
