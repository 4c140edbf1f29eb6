"""Stopping a training from outside, so that nothing is lost.

SIGTERM (a batch system, `kill`), SIGUSR2 (Slurm's warning before the time is over) and Ctrl-C let
the step end, save a checkpoint and end the processes, with exit status 128 + number of the signal.
A second Ctrl-C ends them at once.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.engine import HookBase  # noqa: E402
from detectron2.evaluation import DatasetEvaluator  # noqa: E402
from detectron2.utils import comm  # noqa: E402

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM)


class TrainingStopped(SystemExit):
    """Ends a training that was asked to stop, in every process alike."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class StopRequest:
    """Remembers the first signal of `SIGNALS` that this process got."""

    def __init__(self) -> None:
        self.signal = 0
        self._interrupts = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it signals are remembered; elsewhere they end the process as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only there can a handler be set
            return
        before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= 2:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal = number


def agree(signals: Iterable[int]) -> int:
    """The signal that counts where processes got different ones: the first in `SIGNALS`; or 0."""
    return min((number for number in signals if number), key=SIGNALS.index, default=0)


class StopHook(HookBase):
    """Ends the training behind a step in which a process was asked to; to be registered last.

    The trainer has the processes agree, as part of an exchange that a step makes anyway.
    """

    def after_step(self) -> None:
        last = self.trainer.iter + 1 >= self.trainer.max_iter  # that ends by itself
        if self.trainer.stop_signal and not last:
            raise TrainingStopped(self.trainer.stop_signal)


class StoppableEvaluator(DatasetEvaluator):
    """Gives no result of an evaluation that was cut short.

    Raises:
        TrainingStopped: from `evaluate`, in every process, if one of them was asked to stop.
    """

    def __init__(self, evaluator: DatasetEvaluator, request: StopRequest) -> None:
        self._evaluator, self._request = evaluator, request

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: Any, outputs: Any) -> None:
        self._evaluator.process(inputs, outputs)

    def evaluate(self) -> Any:
        number = agree(comm.all_gather(self._request.signal))
        if number:
            raise TrainingStopped(number)
        return self._evaluator.evaluate()


@contextlib.contextmanager
def forwarding() -> Iterator[StopRequest]:
    """Within it this process hands signals on to the processes that it started, and lives on."""
    request = StopRequest()

    def forward(number: int, frame: FrameType | None) -> None:
        request._remember(number, frame)
        # A terminal has sent its Ctrl-C to the children, too, and a second one would end them.
        number = signal.SIGTERM if number == signal.SIGINT else number
        children = multiprocessing.active_children()
        if not children:  # none has started yet
            raise SystemExit(128 + request.signal)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shield_resource_tracker() -> None:
    """Starts Python's helper process that cleans up after others so that SIGUSR2 spares it.

    It ignores the other signals itself. Call it before anything else has started it.
    """
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which a new program inherits
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(signal.SIGUSR2, before)


def restarted_by_slurm() -> bool:
    """Whether Slurm runs this job for the second time or more."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def requeue(number: int) -> None:
    """Has Slurm run the job again, where its warning (SIGUSR2) was what stopped the training."""
    job = os.environ.get("SLURM_JOB_ID")
    if number != signal.SIGUSR2 or not job:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        logger.info("Slurm was asked to run job %s again.", job)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        logger.warning("scontrol requeue %s failed: %s Submit it again.", job, reason.strip())
