"""The checkpoints of a training in its folder: which one to go on from, and which to remove.

`model_<iteration>.pth`, `model_final.pth` and `model_best.pth` each hold a whole training, and the
file `last_checkpoint` names the one to resume from.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

from dn_detr.checkpoint.reading import CheckpointError, read_checkpoint

logger = logging.getLogger(__name__)

TRAINER = "trainer"  # under this key a checkpoint holds what a training needs to go on
_TAG = "last_checkpoint"
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")


def numbered_name(iteration: int) -> str:
    """Name, without ".pth", of the checkpoint written after an iteration (counted from 0)."""
    return f"model_{iteration:07d}"


def find_checkpoint(folder: str | Path) -> str | None:
    """Finds the checkpoint to resume from: the one that `last_checkpoint` names, if it is whole.

    Else the newest whole one up to that iteration, else beyond it (a future that an earlier
    fallback gave up); a warning says what is wrong with the others. Every file looked at is read
    once, tensors included, and nothing of it is kept.
    `last_checkpoint` means a file in the folder beside it: a folder may have been moved.

    Returns:
        the path; None where there is neither a checkpoint nor a `last_checkpoint`.

    Raises:
        CheckpointError: there are some, and none can be used; all are named.
    """
    folder = Path(folder)
    name, faults = _read_tag(folder)
    if name:
        try:
            _read_iteration(folder / name)
            return str(folder / name)
        except CheckpointError as error:
            faults[name] = error.reason
    for path in _newest_first(folder, name, faults):
        try:
            _read_iteration(path)
        except CheckpointError as error:
            faults[path.name] = error.reason
        else:
            logger.warning(
                "%s\nResuming from %s, the newest that is whole.", _told(folder, faults), path
            )
            return str(path)
    if not (folder / _TAG).exists() and len(faults) == 1:
        return None
    raise CheckpointError(
        f"{_told(folder, faults)}\nNone is left to resume from. Put a whole checkpoint of this "
        f"training there, or start afresh, which removes these: train.overwrite=True instead of "
        f"--resume."
    )


def remove_old_checkpoints(folder: str | Path, keep: int, iteration: int) -> None:
    """Removes all but `keep` of the files `model_<iteration>.pth`, the oldest first.

    Args:
        keep: at least 1.
        iteration: of the file written last. What lies beyond it is of a future that was given up,
            and counts as older than all others.
    """
    numbers = _numbers(folder)
    oldest_first = sorted(numbers, key=lambda path: (numbers[path] <= iteration, numbers[path]))
    for path in oldest_first[:-keep]:
        try:
            path.unlink()
        except OSError as error:
            logger.warning("The old checkpoint %s cannot be removed: %s.", path, error.strerror)


def _read_tag(folder: Path) -> tuple[str, dict[str, str]]:
    """The name in `last_checkpoint`; without one, "" and what is wrong with that file."""
    try:
        text = (folder / _TAG).read_bytes().decode("utf-8", "replace")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return "", {_TAG: "it is missing" if missing else str(error.strerror)}
    text = text.strip(" \t\r\n\0\ufeff")
    name = re.split(r"[\\/]", text)[-1]
    if not name:
        return "", {_TAG: f"it holds no file name but {text!r}" if text else "it is empty"}
    if name != text:
        logger.info("%s names %s: the file of that name beside it is meant.", folder / _TAG, text)
    return name, {}


def _read_iteration(path: Path) -> int:
    """The iteration after which a checkpoint was written.

    Raises:
        CheckpointError: the file is damaged, or no training can go on from it.
    """
    try:
        data = read_checkpoint(path, mmap=True)
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path}: {error.strerror}", str(error.strerror)) from None
    trainer = data.get(TRAINER) if isinstance(data, Mapping) else None
    if not isinstance(trainer, Mapping) or "iteration" not in trainer:
        reason = "it holds weights only, nothing of a training"
        raise CheckpointError(f"Checkpoint {path}: {reason}.", reason)
    return int(trainer["iteration"])


def _newest_first(folder: Path, named: str, faults: dict[str, str]) -> list[Path]:
    """The checkpoints without a fault so far, those up to the iteration of `named` first.

    Those without a number are read for their iteration; what is wrong with them goes to `faults`.
    """
    iterations: dict[Path, int] = _numbers(folder)
    for path in folder.glob("model_*.pth"):
        if path not in iterations and path.name not in faults and path.is_file():
            try:
                iterations[path] = _read_iteration(path)
            except CheckpointError as error:
                faults[path.name] = error.reason
    match = _NUMBERED.fullmatch(named)
    limit = int(match[1]) if match else math.inf
    whole = [path for path in iterations if path.name not in faults]
    return sorted(whole, key=lambda p: (iterations[p] <= limit, iterations[p], p), reverse=True)


def _numbers(folder: str | Path) -> dict[Path, int]:
    """The files `model_<iteration>.pth` and their iterations."""
    matches = {path: _NUMBERED.fullmatch(path.name) for path in Path(folder).glob("model_*.pth")}
    return {path: int(match[1]) for path, match in matches.items() if match and path.is_file()}


def _told(folder: Path, faults: Mapping[str, str]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in faults.items()]
    return "\n".join([f"In {folder}, these cannot be resumed from:", *lines])
