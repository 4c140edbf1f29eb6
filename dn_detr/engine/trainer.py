"""One step of training, on any device.

detectron2's SimpleTrainer has no clipping, accumulation or autocast, and its AMPTrainer wants CUDA;
both raise on a NaN in the main process only, when the others may already have stepped.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.engine import SimpleTrainer  # noqa: E402
from detectron2.utils import comm  # noqa: E402


class Trainer(SimpleTrainer):
    """Trains a model that returns a dict of losses.

    A step (1) runs `accumulate` batches forward and backward, each loss divided by their number,
    (2) clips the gradient over all parameters together, (3) stops every process if a loss or the
    gradient is not finite, (4) lets the optimizer step. Metrics are those of SimpleTrainer
    (`total_loss`, the losses, `data_time`) and `grad_norm`, the norm before clipping.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            model: `model(batch)` returns `{name: scalar loss}`, already weighted; on any device,
                possibly in DistributedDataParallel.
            data_loader: endless; one item is the batch of this process.
            optimizer: over the model's parameters.
            accumulate: batches that make up one step, at least 1.
            clip_grad: arguments of `torch.nn.utils.clip_grad_norm_`, such as `max_norm=0.1`; None
                leaves the gradient as it is.
            amp_dtype: number format of autocast; None trains in the format of the weights. With
                float16 the loss is scaled (`torch.amp.GradScaler`), which needs a GPU.
        """
        super().__init__(model, data_loader, optimizer)
        assert accumulate >= 1, accumulate
        self.accumulate = accumulate
        self.clip_grad = dict(clip_grad) if clip_grad is not None else {"max_norm": math.inf}
        self.amp_dtype = amp_dtype
        self._device = next(model.parameters()).device
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Disabled it passes losses and steps through, so that the step below has one form.
        self.grad_scaler = torch.amp.GradScaler(
            self._device.type, enabled=amp_dtype == torch.float16
        )

    def run_step(self) -> None:
        """One step of the optimizer, see the class.

        Raises:
            FloatingPointError: in every process, before the step; weights are untouched.
        """
        assert self.model.training, "the model was left in eval mode"
        self.optimizer.zero_grad(set_to_none=True)
        losses, data_time = self._backward_all()
        self.after_backward()
        self.grad_scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self._parameters, **self.clip_grad)
        self._record(losses, grad_norm, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _backward_all(self) -> tuple[dict[str, Tensor], float]:
        """Returns the losses, averaged over the accumulated batches, and seconds spent on data."""
        sums: dict[str, Tensor] = {}
        data_time = 0.0
        for part in range(self.accumulate):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            with self._without_gradient_exchange(part < self.accumulate - 1):
                losses = self._forward(batch)
                total = sum(losses.values()) / self.accumulate
                self.grad_scaler.scale(total).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach() / self.accumulate
        return sums, data_time

    def _forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        enabled = self.amp_dtype is not None
        with torch.autocast(self._device.type, dtype=self.amp_dtype, enabled=enabled):
            losses = self.model(batch)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _without_gradient_exchange(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once a step, with the last of the accumulated batches."""
        if wanted and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _record(self, losses: dict[str, Tensor], grad_norm: Tensor, data_time: float) -> None:
        """Checks losses and gradient and writes them to the storage; one transfer of all values."""
        names = [*losses, "grad_norm"]
        values = torch.stack([*(v.float() for v in losses.values()), grad_norm.float()]).tolist()
        metrics = dict(zip(names, values), data_time=data_time)
        self.storage.put_scalar("rank_data_time", data_time)
        gathered = comm.all_gather(metrics)
        self._refuse_non_finite(gathered)
        if comm.is_main_process():
            data_times = [metrics.pop("data_time") for metrics in gathered]
            self.storage.put_scalar("data_time", max(data_times))
            means = {name: sum(m[name] for m in gathered) / len(gathered) for name in names}
            self.storage.put_scalar("grad_norm", means.pop("grad_norm"))
            self.storage.put_scalar("total_loss", sum(means.values()))
            if "total_loss" not in means:
                self.storage.put_scalars(**means)

    def _refuse_non_finite(self, gathered: list[dict[str, float]]) -> None:
        bad = [
            f"process {rank}: {name}={value}"
            for rank, metrics in enumerate(gathered)
            for name, value in metrics.items()
            if name not in ("grad_norm", "data_time") and not math.isfinite(value)
        ]
        # The processes share one gradient, so it is told of only where all losses are finite. A
        # scaled float16 gradient overflows now and then: the scaler skips that step.
        grad_norm = gathered[0]["grad_norm"]
        if not bad and not math.isfinite(grad_norm) and not self.grad_scaler.is_enabled():
            bad = [f"grad_norm={grad_norm}"]
        if bad:
            raise FloatingPointError(
                f"iteration {self.iter}: {', '.join(bad)}. Training stops before the step; the "
                f"weights are those of the iteration before. A smaller optimizer.lr, or "
                f"train.amp.enabled=False, may help."
            )

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, optimizer, and the scaler of float16 where there is one."""
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
