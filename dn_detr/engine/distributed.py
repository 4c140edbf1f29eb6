"""What the processes of one training do together."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any, Callable, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.engine.defaults import create_ddp_model  # noqa: E402
from detectron2.utils import comm  # noqa: E402

T = TypeVar("T")


class SharedError(ValueError):
    """What went wrong in the main process, raised in the others; the main process reports it."""


def on_main_process(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls a function in the main process only; the others wait and get what it returned.

    Args:
        function: returns something that can be pickled. All processes have to get here.

    Raises:
        Exception: what the function raised, in the main process.
        SharedError: with the same text, in the others, so that no process is left waiting.
    """
    if comm.get_world_size() == 1:
        return function(*args, **kwargs)
    result, problem = None, None
    if comm.is_main_process():
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            comm.all_gather((None, f"{type(error).__name__}: {error}"))
            raise
    result, problem = comm.all_gather((result, None))[0]
    if problem is not None:
        raise SharedError(problem)
    return result


def bound_waiting(seconds: float) -> None:
    """Sets how long processes wait for each other where they exchange Python objects.

    Beside NCCL, detectron2 makes a second group for that, which would wait for 30 minutes whatever
    the first one was told.
    """
    if comm.get_world_size() > 1 and dist.get_backend() == "nccl":
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        comm._get_global_gloo_group = lambda: group


def wrap_ddp(model: nn.Module, **kwargs: Any) -> nn.Module:
    """`create_ddp_model`, on the CPU too, where DistributedDataParallel refuses `device_ids`.

    Args:
        model: with all parameters on one device.
        kwargs: of `create_ddp_model`: those of DistributedDataParallel, and `fp16_compression`.

    Returns:
        the model itself where there is one process only.
    """
    if next(model.parameters()).device.type == "cpu":
        kwargs.setdefault("device_ids", None)
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
        kwargs["forward_sync_buffers"] = kwargs.pop("broadcast_buffers", True)  # since torch 2.14
    return create_ddp_model(model, **kwargs)


def share_buffers(model: nn.Module) -> None:
    """Gives all processes the buffers of the main process, whose model is the one that is saved.

    A batch norm collects statistics of its own in every process.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without DistributedDataParallel round it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def leave_group() -> None:
    """Ends the connections between the processes, once all have come here.

    Threads of the group that still run when a process ends can abort it ("terminate called without
    an active exception"), after all work was done.
    """
    if dist.is_available() and dist.is_initialized():
        comm.synchronize()
        dist.destroy_process_group()
