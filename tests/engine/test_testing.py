"""What an evaluation hands to the model."""

import os
import signal
import time

import pytest
import torch

pytest.importorskip("detectron2")

from torch.utils.data import DataLoader, Dataset

from dn_detr.data.categories import DatasetError
from dn_detr.data.loader import prepare_workers
from dn_detr.engine.distributed import share_buffers
from dn_detr.engine.failures import LocalError
from dn_detr.engine.stopping import StopRequest
from dn_detr.engine.testing import _Batches

from tests.processes import finish, start_ranks


@pytest.mark.fault(56)
def test_no_batch_is_handed_out_after_a_signal():
    request, seen = StopRequest(), []
    for batch in _Batches(range(5), request):
        seen.append(batch)
        if batch == 1:
            request.signal = signal.SIGTERM
    assert seen == [0, 1] and len(_Batches(range(5), request)) == 5


@pytest.mark.fault(44)
def test_a_broken_image_is_an_error_of_this_process():
    def load():
        yield 0
        raise DatasetError("The image 3.jpg cannot be read")

    with pytest.raises(LocalError, match="^The image 3.jpg cannot be read$"):
        list(_Batches(load(), StopRequest()))


class SignalsItself(Dataset):
    """A worker gets what a terminal or Slurm sends to all processes of a training."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return index


@pytest.mark.fault(56)
def test_signals_do_not_end_workers():
    loader = DataLoader(SignalsItself(), num_workers=1, batch_size=None)
    prepare_workers(loader)
    began = time.monotonic()
    assert list(loader) == [0, 1, 2, 3]
    assert time.monotonic() - began < 20  # they end with their loader


def share():
    from detectron2.utils import comm

    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(comm.get_rank())
    share_buffers(norm)
    assert norm.running_mean.eq(0).all(), norm.running_mean


def test_processes_evaluate_the_buffers_that_are_saved(tmp_path):
    ranks = start_ranks(2, share, folder=tmp_path)
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "stderr1").read_text()
