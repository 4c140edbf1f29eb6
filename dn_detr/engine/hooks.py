"""Hooks that detectron2 lacks."""

from __future__ import annotations

import logging
import math
import os

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.checkpoint import Checkpointer  # noqa: E402
from detectron2.engine import HookBase  # noqa: E402

from dn_detr.checkpoint.reading import read_checkpoint  # noqa: E402

logger = logging.getLogger(__name__)


class BestCheckpointer(HookBase):
    """Keeps the weights that were best in one metric as `model_best.pth`.

    detectron2's own hook forgets the best value on resume, and then replaces the best weights by
    the next. Here the value lives in the file itself, under `"best"`, and is read from there: a
    training checkpoint that was written before the evaluation of its iteration cannot know it.
    """

    FILE = "model_best"

    def __init__(self, checkpointer: Checkpointer, metric: str, period: int) -> None:
        """
        Args:
            checkpointer: writes the file to its `save_dir`.
            metric: a name in the storage, such as "bbox/AP"; larger is better.
            period: of the evaluation, in iterations; 0: only after training. Register this hook
                after the one that evaluates.
        """
        self._checkpointer = checkpointer
        self._metric = metric
        self._period = period
        self.best: float | None = None
        self.best_iteration: int | None = None

    def before_train(self) -> None:
        if self.trainer.start_iter > 0:
            self._restore()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._compare()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._compare()

    def _compare(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._metric, (math.nan, None))
        if not math.isfinite(value):
            logger.warning(
                "train.best_metric=%s was not computed: no model_best.pth. Name one that is, such "
                "as bbox/AP (bbox_ema/AP needs train.ema.enabled=True).",
                self._metric,
            )
        elif self.best is not None and value <= self.best:
            logger.info(
                "%s is %.3f; the best is %.3f, of iteration %d.",
                *(self._metric, value, self.best, self.best_iteration),
            )
        else:
            self.best, self.best_iteration = float(value), int(iteration)
            logger.info("%s is %.3f, the best so far.", self._metric, value)
            self._save()

    def _save(self) -> None:
        """Writes the file, and leaves `last_checkpoint`, from which training resumes, as it is."""
        last = self._checkpointer.get_checkpoint_file()
        best = {"metric": self._metric, "value": self.best, "iteration": self.best_iteration}
        self._checkpointer.save(self.FILE, iteration=self.best_iteration, best=best)
        if last:
            self._checkpointer.tag_last_checkpoint(os.path.basename(last))

    def _restore(self) -> None:
        path = os.path.join(self._checkpointer.save_dir, f"{self.FILE}.pth")
        if not os.path.isfile(path):
            return
        best = read_checkpoint(path).get("best", {})
        if best.get("metric") == self._metric:
            self.best, self.best_iteration = best["value"], best["iteration"]
            logger.info(
                "the best %s so far is %.3f, of iteration %d.",
                *(self._metric, self.best, self.best_iteration),
            )
