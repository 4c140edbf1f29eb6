"""What is written about a training: metrics, log. It survives a resume, and a full disk."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.engine import HookBase, default_writers, hooks  # noqa: E402
from detectron2.utils.events import EventStorage, EventWriter  # noqa: E402

from dn_detr.checkpoint.writing import write_text_atomically  # noqa: E402

logger = logging.getLogger(__name__)

WINDOW = 20  # the writers of detectron2 give medians over that many iterations


def recent_metrics(storage: EventStorage) -> dict[str, Any]:
    """The values that later lines of metrics.json depend on, as plain data."""
    hints = storage.smoothing_hints()
    return {
        name: {"values": [list(pair) for pair in history.values()[-WINDOW:]], "smooth": hints[name]}
        for name, history in storage.histories().items()
    }


def restore_metrics(storage: EventStorage, metrics: Mapping[str, Any]) -> None:
    """Puts values of `recent_metrics` into a new storage."""
    for name, entry in metrics.items():
        for value, iteration in entry["values"]:
            storage.put_scalar(name, value, smoothing_hint=entry["smooth"], cur_iter=int(iteration))


@contextlib.contextmanager
def _at(iteration: int, storage: EventStorage) -> Iterator[None]:
    """Within it values are put as of another iteration."""
    present, storage.iter = storage.iter, iteration
    try:
        yield
    finally:
        storage.iter = present


class EvalHook(hooks.EvalHook):
    """Evaluates every `period` iterations and at the end.

    A checkpoint is saved before the evaluation of its iteration, and a stop cuts an evaluation
    short. What is due at the iteration that a training resumes from is made up for; detectron2
    leaves it out. Arguments are those of detectron2's hook.
    """

    def before_train(self) -> None:
        last = self.trainer.start_iter - 1
        if last >= 0 and self._is_due(last):
            with _at(last, self.trainer.storage):
                self._do_eval()

    def after_step(self) -> None:
        if self._is_due(self.trainer.iter):
            self._do_eval()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # not if it was stopped
            self._do_eval()

    def _is_due(self, iteration: int) -> bool:
        """Behind the last iteration comes the final evaluation."""
        done = iteration + 1
        return self._period > 0 and done % self._period == 0 and done < self.trainer.max_iter


class RecordWriter(HookBase):
    """Writes metrics to metrics.json, TensorBoard and the log, with detectron2's writers.

    Differs from detectron2's PeriodicWriter: (1) after a resume, metrics.json has every iteration
    once: lines that the checkpoint does not know of are moved to metrics_replaced.json; (2) a
    writer that fails, as on a full disk, costs a warning and its lines, not the training.
    """

    def __init__(self, folder: str, max_iter: int, period: int) -> None:
        """
        Args:
            folder: `train.output_dir`.
            max_iter: of the training, for the time that is left.
            period: in iterations.
        """
        self._folder = Path(folder)
        self._max_iter = max_iter
        self._period = period
        self._writers: Sequence[EventWriter] = ()
        self._failed: set[str] = set()
        self._written: int | None = None

    def before_train(self) -> None:
        last = self.trainer.start_iter - 1
        if self._written is None:  # a new training, or a checkpoint of an older version
            self._written = last
        if last >= 0:
            self._guard("metrics.json", _keep_lines_until, self._folder, self._written)
        self._writers = default_writers(str(self._folder), self._max_iter)
        for writer in self._writers:
            if isinstance(getattr(writer, "_last_write", None), int):
                writer._last_write = self._written
        if last >= 0 and self._is_due(last) and self._written < last:
            with _at(last, self.trainer.storage):  # the training was ended before it came to this
                self._write(last)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._is_due(self.trainer.iter) or done == self.trainer.max_iter:
            self._write(self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._write(self.trainer.iter)  # what hooks before this one have found
        for writer in self._writers:
            self._guard(type(writer).__name__, writer.close)

    def state_dict(self) -> dict[str, Any]:
        if self._written is None:
            return {}
        # Not the iteration behind the last one, to which the final evaluation belongs.
        return {"written": min(self._written, self._max_iter - 1)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._written = state["written"]

    def _is_due(self, iteration: int) -> bool:
        return (iteration + 1) % self._period == 0

    def _write(self, iteration: int) -> None:
        for writer in self._writers:
            self._guard(type(writer).__name__, writer.write)
        self._written = iteration

    def _guard(self, name: str, function: Any, *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:  # TensorBoard's thread hands on what it met, of any type
            if name not in self._failed:
                self._failed.add(name)
                logger.warning(
                    "%s cannot write to %s (%s); the training goes on, and its records have a gap.",
                    *(name, self._folder, error),
                )


def _keep_lines_until(folder: Path, iteration: int) -> None:
    """Moves later lines of metrics.json, and one that was cut off, to metrics_replaced.json."""
    path = folder / "metrics.json"
    if not path.is_file():
        return
    kept, later = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        (kept if _iteration_of(line) <= iteration else later).append(f"{line}\n")
    if not later:
        return
    with (folder / "metrics_replaced.json").open("a", encoding="utf-8") as file:
        file.writelines(later)
    write_text_atomically("".join(kept), path)
    logger.info(
        "%d lines of metrics.json behind iteration %d are written anew; the old ones are kept in "
        "metrics_replaced.json.",
        *(len(later), iteration),
    )


def _iteration_of(line: str) -> float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):  # cut off
        return float("inf")


def forgive_full_disk() -> None:
    """Makes logs that cannot be written cost one warning; Python prints a traceback a line."""
    said: list[str] = []

    def handle_error(record: logging.LogRecord) -> None:
        if not said:
            said.append("once")
            print("The log cannot be written (disk full?); the training goes on.", file=sys.stderr)

    for name in ("detectron2", "fvcore", "dn_detr"):
        for handler in logging.getLogger(name).handlers:
            handler.handleError = handle_error
