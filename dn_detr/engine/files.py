"""The files a training starts from and writes: checked before anything expensive happens."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlparse

from omegaconf import DictConfig

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.utils.file_io import PathManager  # noqa: E402
from iopath.common.file_io import get_cache_dir  # noqa: E402

from dn_detr.engine.overrides import ConfigError  # noqa: E402

logger = logging.getLogger(__name__)

# What a training (and its evaluation) leaves in train.output_dir.
CHECKPOINTS = ("last_checkpoint", "model_*.pth")
RECORDS = (
    "metrics.json",
    "metrics_replaced.json",
    "nonfinite_iter_*.pth",
    "events.out.tfevents.*",
    "inference*/coco_instances_results.json",
    "inference*/instances_predictions.pth",
)


def prepare_output_dir(cfg: DictConfig, resume: bool = False, eval_only: bool = False) -> None:
    """Makes `train.output_dir`; refuses one that holds another training.

    Args:
        cfg: `train.overwrite` allows to remove that, see `clear_output_dir`.
        resume: go on with the training in the folder.
        eval_only: checkpoints in the folder stay as they are.

    Raises:
        ConfigError: the folder cannot be written, or holds checkpoints and nothing says what to do.
    """
    if not cfg.train.output_dir:
        raise ConfigError("train.output_dir is not given: train.output_dir=FOLDER")
    folder = Path(cfg.train.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write_test").touch()
        (folder / ".write_test").unlink()
    except OSError as error:
        raise ConfigError(
            f"train.output_dir={folder} cannot be written: {error.strerror}. "
            f"Choose another: train.output_dir=FOLDER"
        ) from error
    if eval_only or resume:
        return
    found = _matching(folder, CHECKPOINTS)
    if found and not cfg.train.overwrite:
        raise ConfigError(
            f"train.output_dir={folder} already holds checkpoints (such as "
            f"{found[-1].name}). --resume goes on with that training, train.overwrite=True "
            f"starts afresh and removes it, train.output_dir=FOLDER leaves it alone."
        )
    source = Path(cfg.train.init_checkpoint).resolve()
    if any(file.resolve() == source for file in _matching(folder, CHECKPOINTS)):
        raise ConfigError(
            f"train.init_checkpoint={cfg.train.init_checkpoint} lies in train.output_dir, and "
            f"train.overwrite=True would remove it. Choose another train.output_dir."
        )


def require_data(cfg: DictConfig, splits: Iterable[str]) -> None:
    """Looks for the annotation files and image folders of a config.

    Args:
        splits: of `cfg.dataset`, such as ("train", "val").

    Raises:
        ConfigError: lists all that are missing, and the names nearest to them.
    """
    missing = []
    for split in splits:
        data = cfg.dataset[split]
        for key, exists in (("json", os.path.exists), ("images", os.path.isdir)):
            path = os.path.abspath(os.path.expanduser(data[key]))
            if not exists(path):
                missing.append(f"dataset.{split}.{key}: {path} does not exist; {_nearest(path)}")
    if missing:
        folder = os.environ.get("DETECTRON2_DATASETS")
        value = f"is {folder!r}" if folder is not None else "is not set"
        raise ConfigError(
            "\n  ".join(["there are no data where the config looks:", *missing])
            + f"\nThe variable DETECTRON2_DATASETS {value}: set it to the folder that holds the "
            "data sets, or the keys above to your files."
        )


def _nearest(path: str) -> str:
    """The last folder of a path that exists, and the names in it nearest to what is missing."""
    folder, name = os.path.split(path)
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    near = difflib.get_close_matches(name, names, n=3) or names[:3]
    return f"{folder} holds no {name}{', but ' if near else ''}{', '.join(near)}"


def require_checkpoint(cfg: DictConfig) -> None:
    """Refuses to evaluate weights that nobody named.

    Raises:
        ConfigError: `train.init_checkpoint` is empty, or the ImageNet backbone of the config.
    """
    path = cfg.train.init_checkpoint
    if path and "ImageNetPretrained" not in path:
        return
    last = Path(cfg.train.output_dir) / "model_final.pth"
    example = last if last.is_file() else "FILE"
    what = f"{path} holds a backbone only" if path else "no checkpoint is given"
    raise ConfigError(
        f"--eval-only evaluates a trained model, and {what}: train.init_checkpoint={example}"
    )


def fetch_weights(path: str) -> str:
    """Returns a local file for a path or an address; downloads go to iopath's cache.

    Raises:
        ConfigError: an address that cannot be fetched; the message says where the file belongs.
    """
    if "://" not in path:
        return path
    try:
        return PathManager.get_local_path(path)
    except Exception as error:  # urllib, ssl, iopath and the handlers raise what they like
        reason = str(error).strip().splitlines()
        raise ConfigError(_cannot_fetch(path, reason[0] if reason else repr(error))) from error


def _cannot_fetch(path: str, reason: str) -> str:
    url = path.replace("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
    cached = os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))
    return (
        f"cannot fetch the weights {os.path.basename(path)} from {url} ({reason}).\n"
        f"Download that file elsewhere and put it at {cached}, or name it: "
        f'train.init_checkpoint=FILE. To train from scratch: train.init_checkpoint=""'
    )


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [p for pattern in patterns for p in sorted(folder.glob(pattern)) if p.is_file()]


def clear_output_dir(cfg: DictConfig) -> None:
    """Removes what an earlier training wrote to `train.output_dir`, and nothing else.

    Called when nothing can be refused any more. The log goes on in its file.
    """
    for file in _matching(Path(cfg.train.output_dir), CHECKPOINTS + RECORDS):
        file.unlink()
