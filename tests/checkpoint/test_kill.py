"""kill -9 at random moments of saving: what is left can be resumed from."""

import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine.train_loop import TrainerBase

from dn_detr.checkpoint.checkpointer import DNCheckpointer
from dn_detr.checkpoint.folder import find_checkpoint
from dn_detr.checkpoint.reading import read_checkpoint
from dn_detr.engine.hooks import PeriodicCheckpointer
from tests.processes import start

KILLS = 20
NUMEL = 500_000  # of each of two tensors: files of 4 MB


class Counter(TrainerBase):
    """The weights are, throughout, the number of the iteration."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        for name in "ab":
            self.model.register_buffer(name, torch.zeros(NUMEL))

    def run_step(self):
        for buffer in self.model.buffers():
            buffer.fill_(self.iter)
        if self.iter % 3 == 2:  # one name is written over and over again
            self.periodic._checkpointer.save("model_final", iteration=self.iter)


def save_for_ever(folder: str, first: int) -> None:
    trainer = Counter()
    checkpointer = DNCheckpointer(trainer.model, folder, trainer=trainer)
    trainer.periodic = PeriodicCheckpointer(checkpointer, period=1, max_to_keep=2)
    trainer.register_hooks([trainer.periodic])
    trainer.train(first, first + 1_000_000)


def whole_state(path) -> int:
    """The one iteration that all parts of a checkpoint are of."""
    data = read_checkpoint(path)
    values = {data["iteration"], data["trainer"]["iteration"]}
    for tensor in data["model"].values():
        assert len(tensor) == NUMEL and tensor.min() == tensor.max()
        values.add(int(tensor[0]))
    assert len(values) == 1
    return values.pop()


def wait_for_a_save(process: BaseProcess, folder: Path) -> None:
    """Until the process has named another checkpoint in `last_checkpoint`, or has died."""
    tag = folder / "last_checkpoint"
    before = tag.stat().st_mtime_ns if tag.exists() else 0
    while process.is_alive() and not (tag.exists() and tag.stat().st_mtime_ns > before):
        time.sleep(0.001)


@pytest.mark.fault(23)
def test_killed_at_random_moments(tmp_path, caplog):
    folder, generator, last = tmp_path / "out", random.Random(23), -1
    folder.mkdir()
    interrupted = 0
    for _ in range(KILLS):
        process = start(save_for_ever, str(folder), last + 1, folder=tmp_path)
        try:
            wait_for_a_save(process, folder)
            began = time.perf_counter()
            wait_for_a_save(process, folder)
            one_save = time.perf_counter() - began
            time.sleep(generator.uniform(0, 2 * one_save))
        finally:
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "stderr").read_text()
        for path in folder.glob("*.pth"):
            whole_state(path)  # nothing cut has a final name
        found = whole_state(find_checkpoint(folder))
        assert found > last  # nothing that was named is lost
        last = found
        interrupted += any(folder.glob(".*.tmp"))
    assert not [record for record in caplog.records if record.name == "dn_detr.checkpoint.folder"]
    assert interrupted >= 3  # the moments were those of saving
