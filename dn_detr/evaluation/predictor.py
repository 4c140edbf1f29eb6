"""Predictions of a checkpoint on single images, prepared as in its config's evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import instantiate  # noqa: E402
from detectron2.data import transforms as T  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from dn_detr.checkpoint.checkpointer import DNCheckpointer  # noqa: E402
from dn_detr.checkpoint.class_rows import count_classes  # noqa: E402
from dn_detr.checkpoint.reading import CheckpointError, read_checkpoint  # noqa: E402
from dn_detr.data.categories import class_mapping, read_categories  # noqa: E402
from dn_detr.data.images import ImageError, read_image  # noqa: E402
from dn_detr.engine.files import fetch_weights  # noqa: E402

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Predictor:
    """A model with the weights of a checkpoint, and what its config does to a test image.

    Attributes:
        model: in eval mode, on its device.
        class_names: of the model's classes, from the checkpoint; from `dataset.val.json` if it
            does not name them.
        source: which weights these are, in words.
    """

    def __init__(self, cfg: DictConfig, weights: str, averaged: bool = True) -> None:
        """
        Args:
            cfg: of `load_config`; `model.num_classes` (then that of the weights) and
                `train.device` may be null.
            weights: a checkpoint file, or an address that detectron2 can fetch.
            averaged: take the averaged weights (train.ema) if the checkpoint has some.

        Raises:
            CheckpointError: the file cannot be read, or is not of this config's model.
            DatasetError: neither the checkpoint nor the config tells the classes.
        """
        path = fetch_weights(weights)
        checkpoint = read_checkpoint(path)
        categories = _categories(checkpoint) or read_categories(cfg.dataset.val.json)
        number = cfg.model.num_classes
        if number is None:  # more than the categories where classes are their ids: COCO's 91
            number = _count_classes(checkpoint)
        names, _ = class_mapping(categories, number, source=path)
        self.class_names: list[str] = names
        cfg = cfg.copy()
        cfg.model.num_classes = len(names)
        device = cfg.train.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: nn.Module = instantiate(cfg.model).to(device).eval()
        rest = DNCheckpointer(self.model).load_weights(path, categories=None, strict=True)
        self.source = path
        if averaged and "ema" in rest:
            self.model.load_state_dict(rest["ema"]["model"])
            self.source = f"{path} (averaged weights)"
        mapper = instantiate(cfg.dataloader.test.mapper)
        self._augmentations = mapper.augmentations
        self._image_format: str = mapper.image_format

    @torch.no_grad()
    def __call__(self, image: np.ndarray):
        """Predicts on one image.

        Args:
            image: uint8 [H, W, 3], RGB.

        Returns:
            `Instances` on the CPU, best first: pred_boxes (xyxy in pixels of `image`), scores and
            pred_classes.
        """
        ordered = image[:, :, ::-1] if self._image_format == "BGR" else image
        prepared = T.AugInput(np.ascontiguousarray(ordered))
        self._augmentations(prepared)
        tensor = torch.from_numpy(np.ascontiguousarray(prepared.image.transpose(2, 0, 1)))
        height, width = image.shape[:2]
        (output,) = self.model([{"image": tensor, "height": height, "width": width}])
        instances = output["instances"].to("cpu")
        return instances[instances.scores.argsort(descending=True)]


def _count_classes(checkpoint: Any) -> int | None:
    """The number of classes that a checkpoint has weights for; None if that cannot be told."""
    weights = checkpoint.get("model") if isinstance(checkpoint, Mapping) else None
    return count_classes(weights) if isinstance(weights, Mapping) else None


def _categories(checkpoint: Any) -> Sequence[dict[str, Any]]:
    """The categories that a checkpoint names; none if it is not one of ours."""
    metadata = checkpoint.get("metadata") if isinstance(checkpoint, Mapping) else None
    return metadata.get("categories", []) if isinstance(metadata, Mapping) else []


def find_weights(cfg: DictConfig, weights: str | None) -> str:
    """The checkpoint to use: the one named, else the best of the config's own training.

    Raises:
        CheckpointError: none is named, and there is none in `train.output_dir`.
    """
    if weights:
        return weights
    folder = Path(cfg.train.output_dir)
    for name in ("model_best.pth", "model_final.pth"):
        if (folder / name).is_file():
            return str(folder / name)
    raise CheckpointError(
        f"No checkpoint is named, and there is no model_best.pth or model_final.pth in "
        f"train.output_dir={folder}: name one with --weights FILE."
    )


def find_images(paths: Sequence[str]) -> list[Path]:
    """Images that are named, and those in folders that are named (not in folders below).

    Raises:
        ValueError: a path does not exist, or a folder holds no images.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
            images += found
        elif path.is_file():
            images.append(path)
        else:
            raise ValueError(f"there is no image or folder {path}")
    return images


def read_rgb(path: str | Path) -> np.ndarray:
    """Reads an image, turned as its EXIF data says: uint8 [H, W, 3], RGB.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return read_image(str(path))[0]
    except ImageError as error:
        raise ValueError(f"the image {path} cannot be read: {error}") from error
