"""Activation checkpointing: memory for time."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run(function: Callable, *args: Any, checkpointed: bool) -> Any:
    """``function(*args)``; `checkpointed`, its activations are computed again in the backward pass.

    For modules without random numbers: their state is not kept, since reading it would make the
    host wait for the accelerator.
    """
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)
