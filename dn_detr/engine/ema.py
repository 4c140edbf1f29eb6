"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.engine import HookBase  # noqa: E402

from dn_detr.engine.distributed import unwrap  # noqa: E402


class WeightAverage:
    """A second set of weights that follows the trained ones: w <- d * w + (1 - d) * trained.

    The decay d warms up, `min(decay, (1 + t) / (10 + t))` at update t = 1, 2, ..., so that the
    random start is soon forgotten; update 0 copies. Buffers are copied at every update.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9997) -> None:
        """
        Args:
            model: the trained model; DistributedDataParallel is looked through.
            decay: in [0, 1).
        """
        self._decay = decay
        # Its counter stays on the CPU, so that reading it does not wait for the accelerator.
        self._average = AveragedModel(unwrap(model), multi_avg_fn=self._move)
        self._average.requires_grad_(False)
        self._average.eval()

    @property
    def model(self) -> nn.Module:
        """The averaged model, in eval mode."""
        return self._average.module

    @property
    def updates(self) -> int:
        """The number of updates so far."""
        return int(self._average.n_averaged)

    def decay_at(self, update: int) -> float:
        """The decay of one update, counted from 0; update 0 is a copy."""
        return min(self._decay, (1 + update) / (10 + update)) if update > 0 else 0.0

    def update(self, model: nn.Module) -> None:
        """Moves the average towards the weights of `model`."""
        self._average.update_parameters(unwrap(model))

    @torch.no_grad()
    def _move(self, averaged: list[Tensor], current: list[Tensor], _: Tensor | int) -> None:
        weight = 1.0 - self.decay_at(self.updates)
        torch._foreach_lerp_(averaged, current, weight)

    def state_dict(self) -> dict[str, Any]:
        """`{"model": weights, "updates": number of updates}`."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.model.load_state_dict(state_dict["model"])
        self._average.n_averaged.fill_(state_dict["updates"])


class EMAHook(HookBase):
    """Updates the average after every step."""

    def __init__(self, average: WeightAverage) -> None:
        self._average = average

    def after_step(self) -> None:
        self._average.update(self.trainer.model)
