"""Hooks that write checkpoints, and lose neither the training nor a former file to a full disk."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.engine import HookBase, TrainerBase  # noqa: E402

from dn_detr.checkpoint.checkpointer import CheckpointError, DNCheckpointer  # noqa: E402
from dn_detr.checkpoint.folder import (  # noqa: E402
    TRAINER,
    numbered_name,
    remove_old_checkpoints,
)
from dn_detr.checkpoint.reading import read_checkpoint  # noqa: E402

logger = logging.getLogger(__name__)

_RETRY = 100  # iterations


class PeriodicCheckpointer(HookBase):
    """Writes `model_<iteration>.pth` every `period` iterations.

    detectron2's own hook ends the training where a file cannot be written, and counts the files to
    keep from the start of the process. Here a failure is a warning and tried again, and the files
    in the folder are what is counted. `model_final.pth` is left to `FinalCheckpointer`.
    """

    def __init__(
        self, checkpointer: DNCheckpointer, period: int, max_to_keep: int | None = None
    ) -> None:
        """
        Args:
            checkpointer: writes the files to its `save_dir`.
            period: in iterations.
            max_to_keep: of the files with a number; None: all.
        """
        self._checkpointer = checkpointer
        self._period = period
        self._max_to_keep = max_to_keep
        self._saved: int | None = None
        self._retry: int | None = None

    def after_step(self) -> None:
        done, last = self.trainer.iter + 1, self.trainer.max_iter
        if done % self._period == 0 or done == self._retry:
            self._retry = min(done + min(self._period, _RETRY), last) if done < last else None
            if self._save_numbered(self._retry):
                self._retry = None

    def save_now(self) -> bool:
        """Writes the checkpoint of this iteration, unless it is there; call it after a whole step.

        Returns:
            whether it is there; if not, a warning has said why.

        Raises:
            TypeError: a state holds what cannot be saved.
        """
        return self._save_numbered(None)

    def _save_numbered(self, next_try: int | None) -> bool:
        iteration = self.trainer.iter
        if self._saved == iteration:
            return True
        try:
            _save(self._checkpointer, self.trainer, numbered_name(iteration), iteration)
        except _NotSaved as error:
            of = f"{next_try} of {self.trainer.max_iter} iterations"
            logger.warning("%s%s", error, f" The next try comes after {of}." if next_try else "")
            return False
        self._saved = iteration
        if self._max_to_keep is not None:
            folder = self._checkpointer.save_dir
            remove_old_checkpoints(folder, self._max_to_keep, iteration)
        return True


class FinalCheckpointer(HookBase):
    """Writes `model_final.pth` after the last step; to be registered last.

    Where that fails, the last evaluation still runs, and the file is tried again after it. Only
    then the training ends with an error.
    """

    FILE = "model_final"

    def __init__(self, checkpointer: DNCheckpointer, resumed_from: str = "") -> None:
        """
        Args:
            checkpointer: writes the file to its `save_dir`.
            resumed_from: the file that the training goes on from; "" for a new one.
        """
        self._checkpointer = checkpointer
        self._resumed_from = os.path.basename(resumed_from)
        self._saved = False

    def before_train(self) -> None:
        if self.trainer.start_iter >= self.trainer.max_iter:  # only the evaluation is made up for
            self._saved = self._resumed_from == f"{self.FILE}.pth"

    def after_step(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            try:
                self._save()
            except _NotSaved as error:
                logger.warning("%s The next try comes after the last evaluation.", error)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter and not self._saved:
            try:
                self._save()
            except _NotSaved as error:
                raise CheckpointError(f"{error} Make room there, then --resume.") from error

    def _save(self) -> None:
        _save(self._checkpointer, self.trainer, self.FILE, self.trainer.max_iter - 1)
        self._saved = True


class _NotSaved(CheckpointError):
    """What was there before is intact."""


def _save(
    checkpointer: DNCheckpointer, trainer: TrainerBase, name: str, iteration: int, **extra: Any
) -> None:
    """Saves what the trainer has after an iteration.

    Raises:
        _NotSaved: the file cannot be written.
    """
    # Before and after training, the trainer's own iteration is one ahead of the weights.
    state = {**trainer.state_dict(), "iteration": iteration}
    try:
        checkpointer.save(name, iteration=iteration, **{TRAINER: state}, **extra)
    except OSError as error:
        path = os.path.join(checkpointer.save_dir, f"{name}.pth")
        last = os.path.basename(checkpointer.get_checkpoint_file())
        former = f"The checkpoint before it, {last}, is whole." if last else "There is none yet."
        reason = error.strerror or error
        raise _NotSaved(f"{path} could not be saved: {reason}. {former}") from error


class BestCheckpointer(HookBase):
    """Keeps the weights that were best in one metric as `model_best.pth`.

    detectron2's own hook forgets the best value on resume, and then replaces the best weights by
    the next. Here the value lives in the file itself, under "best", and is read from there: a
    training checkpoint that was written before the evaluation of its iteration cannot know it. The
    training checkpoints have it too, should the file be damaged.
    """

    FILE = "model_best"

    def __init__(self, checkpointer: DNCheckpointer, metric: str, period: int) -> None:
        """
        Args:
            checkpointer: writes the file to its `save_dir`.
            metric: a name in the storage, such as "bbox/AP"; larger is better. Every new value is
                compared. Register this hook after the one that evaluates.
            period: of the evaluation, in iterations; 0: only after training. After an evaluation
                without a value, a warning says so.
        """
        self._checkpointer = checkpointer
        self._metric = metric
        self._period = period
        self.best: float | None = None
        self.best_iteration: int | None = None

    def before_train(self) -> None:
        if self.trainer.start_iter > 0:
            self._restore()
            self._compare(self.trainer.start_iter - 1, due=False)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        due = self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter
        self._compare(self.trainer.iter, due)

    def after_train(self) -> None:
        last = self.trainer.max_iter - 1
        self._compare(min(self.trainer.iter, last), due=self.trainer.iter > last)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.best is None else {"best": self._best()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._take(state_dict["best"])

    def _best(self) -> dict[str, Any]:
        return {"metric": self._metric, "value": self.best, "iteration": self.best_iteration}

    def _take(self, best: dict[str, Any]) -> None:
        if best.get("metric") == self._metric:
            self.best, self.best_iteration = best["value"], best["iteration"]

    def _compare(self, iteration: int, due: bool) -> None:
        """Compares the value if it is of the weights after `iteration`."""
        value, written = self.trainer.storage.latest().get(self._metric, (None, -1))
        is_new = written >= max(iteration, 0)
        if (is_new or due) and (value is None or not math.isfinite(value)):
            logger.warning(
                "train.best_metric=%s was not computed: no model_best.pth. Name one that is, such "
                "as bbox/AP (bbox_ema/AP needs train.ema.enabled=True).",
                self._metric,
            )
        elif is_new and self.best is not None and value <= self.best:
            logger.info(
                "%s is %.3f; the best is %.3f, of iteration %d.",
                *(self._metric, value, self.best, self.best_iteration),
            )
        elif is_new:
            logger.info("%s is %.3f, the best so far.", self._metric, value)
            self._save(float(value), iteration)

    def _save(self, value: float, iteration: int) -> None:
        before = self.best, self.best_iteration
        self.best, self.best_iteration = value, iteration
        extra = {"best": self._best(), "tag": False}
        try:
            _save(self._checkpointer, self.trainer, self.FILE, iteration, **extra)
        except _NotSaved as error:
            self.best, self.best_iteration = before
            logger.warning("%s The next evaluation is the next try.", error)

    def _restore(self) -> None:
        """Takes the best value from the file; where that cannot be, keeps the checkpoint's."""
        path = os.path.join(self._checkpointer.save_dir, f"{self.FILE}.pth")
        if self.best is None and not os.path.isfile(path):
            return
        try:
            self._take(read_checkpoint(path, mmap=True).get("best", {}))
        except CheckpointError as error:
            when = "by the next evaluation"
            if self.best is not None:
                best = f"{self.best:.3f}, of iteration {self.best_iteration}"
                when = f"when {self._metric} exceeds {best}"
            logger.warning("%s cannot be used: %s. It is replaced %s.", path, error.reason, when)
        if self.best is not None:
            logger.info(
                "the best %s so far is %.3f, of iteration %d.",
                *(self._metric, self.best, self.best_iteration),
            )
