"""Loading a LazyConfig, and filling what it leaves to the data and the machine."""

from __future__ import annotations

import builtins
import logging
import math
import os
import traceback
from typing import Any, Callable

import torch

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import LazyConfig, instantiate  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from dn_detr.data.datasets import class_mapping, count_images, read_categories  # noqa: E402
from dn_detr.engine.distributed import on_main_process  # noqa: E402
from dn_detr.engine.files import require_data  # noqa: E402
from dn_detr.engine.overrides import NULLABLE_TYPES, ConfigError, apply_overrides  # noqa: E402

__all__ = ["ConfigError", "load_config", "refuse_invalid_values", "resolve_config"]

_Range = tuple[type, Callable[[Any], bool], str]  # kind, whether it is valid, in words

SECTIONS = ("model", "dataset", "dataloader", "optimizer", "lr_multiplier", "train")

# Without these nothing can be run.
NEEDED = (
    *("model", "lr_multiplier", "optimizer.lr", "train.output_dir"),
    *("dataset.train.json", "dataset.val.json", "dataset.train.images", "dataset.val.images"),
    *("dataloader.train.dataset", "dataloader.train.mapper", "dataloader.train.total_batch_size"),
    *("dataloader.test.dataset", "dataloader.test.mapper", "dataloader.evaluator"),
)

_POSITIVE: _Range = (int, lambda x: x >= 1, "an integer of at least 1")
_COUNT: _Range = (int, lambda x: x >= 0, "an integer of at least 0")
_NOT_NEGATIVE: _Range = (float, lambda x: 0 <= x < math.inf, "a finite number of at least 0")
NUMBERS: dict[str, _Range] = {
    "train.max_iter": _POSITIVE,
    "train.epochs": (float, lambda x: 0 < x < math.inf, "a finite number above 0"),
    "train.accumulate": _POSITIVE,
    "train.log_period": _POSITIVE,
    "train.reference_batch_size": _POSITIVE,
    "train.checkpointer.period": _POSITIVE,
    "train.checkpointer.max_to_keep": _POSITIVE,
    "train.eval_period": (int, lambda x: x >= 0, "an integer: 0 (at the end) or more"),
    "train.seed": (int, lambda x: True, "an integer (negative: a random one)"),
    "train.dist_timeout": (float, lambda x: 0 < x < math.inf, "a number of seconds above 0"),
    "train.ema.decay": (float, lambda x: 0 <= x < 1, "0 <= decay < 1"),
    "train.clip_grad.params.max_norm": (
        float,
        lambda x: x > 0,
        "a number above 0 (train.clip_grad.enabled=False switches clipping off)",
    ),
    "train.clip_grad.params.norm_type": (float, lambda x: x > 0, "a number above 0"),
    "optimizer.lr": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "dataloader.train.total_batch_size": _POSITIVE,
    "dataloader.train.num_workers": _COUNT,
    "dataloader.test.batch_size": _POSITIVE,
    "dataloader.test.num_workers": _COUNT,
}
CHOICES = {
    "train.amp.dtype": ("bfloat16", "float16"),
    "dataloader.train.on_bad_image": ("error", "skip"),
}
_ABSENT = object()

logger = logging.getLogger(__name__)


def load_config(path: str, overrides: list[str] | None = None) -> DictConfig:
    """Loads a config file and applies `key=value` overrides.

    Args:
        path: a LazyConfig: a .py file, or a saved .yaml. It is a program: load only what you would
            run.
        overrides: see `dn_detr.engine.overrides.apply_overrides`. `train.epochs` without
            `train.max_iter` sets the latter to null, to be computed.

    Returns:
        the config, with nothing resolved yet.

    Raises:
        ConfigError: no such file, a file that is no config, or an override that cannot be used.
    """
    if not path:
        raise ConfigError("no config given: --config-file projects/dn_detr/configs/NAME.py")
    if os.path.splitext(path)[1] not in (".py", ".yaml", ".yml"):
        raise ConfigError(f"config file {path}: expected a .py or .yaml file.")
    if not os.path.isfile(path):
        raise ConfigError(f"config file {path} does not exist.")
    cfg = _load_file(path)
    missing = [name for name in SECTIONS if name not in cfg]
    if missing:
        raise ConfigError(f"config file {path} does not define {', '.join(missing)}.")
    apply_overrides(cfg, list(overrides or []))
    given = {override.lstrip("+").partition("=")[0] for override in overrides or []}
    if "train.epochs" in given and "train.max_iter" not in given:
        cfg.train.max_iter = None  # who asks for epochs does not want the number of the file
    if cfg.train.get("init_checkpoint", "") is None:
        cfg.train.init_checkpoint = ""  # both mean: from scratch
    return cfg


def _load_file(path: str) -> DictConfig:
    # LazyConfig replaces the import function while a config runs, and leaves it so on an error.
    original_import = builtins.__import__
    try:
        return LazyConfig.load(path)
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        raise ConfigError(f"{_place(path, cause)}: {type(cause).__name__}: {cause}") from error
    finally:
        builtins.__import__ = original_import


def _place(path: str, error: BaseException) -> str:
    """file:line of what failed: in the config, or in a config that it imports."""
    if isinstance(error, SyntaxError):
        return f"config file {path}:{error.lineno}"
    folder = os.path.dirname(os.path.abspath(path))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        near = os.path.dirname(os.path.abspath(frame.filename)) == folder
        if near or f"{os.sep}configs{os.sep}" in frame.filename:
            return f"config file {frame.filename}:{frame.lineno}"
    return f"config file {path}"


def resolve_config(cfg: DictConfig, num_processes: int = 1, eval_only: bool = False) -> None:
    """Fills, in place, what a config leaves to the data and the machine.

    That is: the data of `dataset.generate` (made by the main process if it is not there),
    `model.num_classes`, `train.device`, `train.best_metric`, `train.max_iter`, the periods left
    null (one epoch), and `optimizer.lr` where `train.scale_lr` asks for it. Done before the config
    is saved, so that the saved one says what was run; a resolved config is left as it is.

    Args:
        cfg: of `load_config`.
        num_processes: that train together; all of them call this.
        eval_only: only `dataset.val` is used: its categories count, and no training is planned.

    Raises:
        ConfigError: values that cannot be used, all of them in one message.
    """
    refuse_invalid_values(cfg, num_processes)
    if cfg.train.device is None:
        cfg.train.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.train.best_metric is None:
        cfg.train.best_metric = "bbox_ema/AP" if cfg.train.ema.enabled else "bbox/AP"
    on_main_process(_generate_data, cfg)
    classes, images = on_main_process(_read_data, cfg, eval_only)
    cfg.model.num_classes = classes
    if not eval_only:
        _plan_training(cfg, images)


def total_batch_size(cfg: DictConfig) -> int:
    """Images a step of the optimizer sees, over all processes and accumulated batches."""
    return cfg.dataloader.train.total_batch_size * cfg.train.accumulate


def training_categories(cfg: DictConfig, eval_only: bool = False) -> list[dict[str, Any]]:
    """The categories `{"id", "name"}` that the classes of the model stand for, ordered by id."""
    return read_categories(cfg.dataset.val.json if eval_only else cfg.dataset.train.json)


def _generate_data(cfg: DictConfig) -> None:
    generate = cfg.dataset.get("generate")
    if generate is None:
        return
    root = os.path.join(os.path.abspath(generate.root), "")
    if any(os.path.abspath(cfg.dataset[s].json).startswith(root) for s in ("train", "val")):
        instantiate(generate)


def _read_data(cfg: DictConfig, eval_only: bool) -> tuple[int, int]:
    """Returns the number of classes and of training images (0 with eval_only).

    Raises:
        ConfigError: files are missing, or train and val do not name the same categories.
    """
    require_data(cfg, ["val"] if eval_only else ["train", "val"])
    categories = training_categories(cfg, eval_only)
    source = cfg.dataset.val.json if eval_only else cfg.dataset.train.json
    names, _ = class_mapping(categories, cfg.model.num_classes, source)
    if eval_only:
        return len(names), 0
    others = read_categories(cfg.dataset.val.json)
    if others != categories:
        raise ConfigError(
            f"train and val have different categories.\n"
            f"  only in {cfg.dataset.train.json}: {_only(categories, others)}\n"
            f"  only in {cfg.dataset.val.json}: {_only(others, categories)}\n"
            f"Both files need the same `categories`, id and name."
        )
    images = count_images(cfg.dataset.train.json)
    if not images:
        raise ConfigError(f"{cfg.dataset.train.json} holds no images.")
    return len(names), images


def _only(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    return ", ".join(f"{c['id']} {c['name']!r}" for c in first if c not in second) or "none"


def _plan_training(cfg: DictConfig, images: int) -> None:
    train, batch = cfg.train, total_batch_size(cfg)
    epoch = max(1, round(images / batch))
    if train.max_iter is None:
        train.max_iter = math.ceil(train.epochs * images / batch)
    if train.eval_period is None:
        train.eval_period = epoch
    if train.checkpointer.period is None:
        train.checkpointer.period = epoch
    logger.info(
        "%d images, %d in a step: %d iterations are %.4g epochs.",
        *(images, batch, train.max_iter, train.max_iter * batch / images),
    )
    if batch != train.reference_batch_size:
        _adapt_learning_rate(cfg, batch)


def _adapt_learning_rate(cfg: DictConfig, batch: int) -> None:
    reference, lr = cfg.train.reference_batch_size, cfg.optimizer.lr
    scaled = lr * batch / reference
    if not cfg.train.scale_lr:
        logger.info(
            "optimizer.lr=%g is meant for %d images in a step, here there are %d; it is left as it "
            "is (train.scale_lr=True would make it %g).",
            *(lr, reference, batch, scaled),
        )
        return
    logger.info("optimizer.lr: %g for %d images, so %g for %d.", lr, reference, scaled, batch)
    cfg.optimizer.lr = scaled
    # The saved config holds the scaled rate: say what it is for, or it would be scaled again.
    cfg.train.reference_batch_size = batch


def refuse_invalid_values(cfg: DictConfig, num_processes: int = 1) -> None:
    """Checks the values that need no data.

    Raises:
        ConfigError: lists every value that cannot be used.
    """
    problems = _missing(cfg) or _bad_numbers(cfg) + _bad_choices(cfg) + _bad_machine(
        cfg, num_processes
    )
    if problems:
        raise ConfigError("\n  ".join(["the config cannot be used:", *problems]))


def _missing(cfg: DictConfig) -> list[str]:
    """Parts that are null or that cannot be read; without them nothing else can be checked."""
    problems = []
    for key in NEEDED:
        try:
            if OmegaConf.select(cfg, key, throw_on_missing=True) is None:
                problems.append(f"{key} is not given")
        except OmegaConfBaseException as error:
            problems.append(f"{key}: {str(error).splitlines()[0]}")
    return problems


def _bad_numbers(cfg: DictConfig) -> list[str]:
    """Checks numbers against their ranges; a config need not have all of them."""
    ranges = dict(NUMBERS)
    if cfg.train.max_iter is not None:
        del ranges["train.epochs"]  # of no effect
    if not cfg.train.clip_grad.enabled:
        ranges = {k: r for k, r in ranges.items() if not k.startswith("train.clip_grad.")}
    problems = []
    for key, (kind, is_valid, expected) in ranges.items():
        value = OmegaConf.select(cfg, key, default=_ABSENT)
        if value is _ABSENT or (value is None and key in NULLABLE_TYPES and key != "train.epochs"):
            continue
        if not (_is_number(value, kind) and is_valid(value)):
            shown = "null" if value is None else value
            problems.append(f"{key}={shown}: expected {expected}")
    return problems


def _is_number(value: Any, kind: type) -> bool:
    kinds = (int,) if kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and not math.isnan(value)


def _bad_choices(cfg: DictConfig) -> list[str]:
    problems = []
    for key, choices in CHOICES.items():
        value = OmegaConf.select(cfg, key, default=_ABSENT)
        if value is not _ABSENT and value not in choices:
            problems.append(f"{key}={value}: expected {' or '.join(choices)}")
    try:
        instantiate(cfg.lr_multiplier)
    except Exception as error:  # schedules check their arguments by whatever they like
        problems.append(f"lr_multiplier: {type(error).__name__}: {error}")
    return problems


def _bad_machine(cfg: DictConfig, num_processes: int) -> list[str]:
    """Checks what depends on the machine: device, number format, processes."""
    problems = []
    batch = cfg.dataloader.train.total_batch_size
    if isinstance(batch, int) and batch >= 1 and batch % num_processes:
        below = batch // num_processes * num_processes
        near = " or ".join(str(n) for n in (below, below + num_processes) if n > 0)
        problems.append(
            f"dataloader.train.total_batch_size={batch} cannot be shared by {num_processes} "
            f"processes: take {near}"
        )
    device = cfg.train.device
    on_gpu = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    try:
        torch.device("cpu" if device is None else device)
    except RuntimeError:
        problems.append(f"train.device={device}: expected cuda, cpu or null (the GPU if there is)")
    if num_processes > 1 and ":" in str(device):
        problems.append(f"train.device={device} names one GPU for {num_processes} processes: cuda")
    if on_gpu and not torch.cuda.is_available():
        problems.append(f"train.device={device}, but torch finds no GPU: train.device=cpu")
    elif on_gpu and device is not None and ":" in str(device):
        count = torch.cuda.device_count()
        if str(device) not in [f"cuda:{index}" for index in range(count)]:
            problems.append(f"train.device={device}, but GPUs are cuda:0 to cuda:{count - 1}")
    if cfg.train.amp.enabled and cfg.train.amp.dtype == "float16" and not on_gpu:
        problems.append("train.amp.dtype=float16 needs a GPU: train.amp.dtype=bfloat16")
    return problems
