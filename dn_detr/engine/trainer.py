"""One step of training, on any device.

detectron2's SimpleTrainer has no clipping, accumulation or autocast, and its AMPTrainer wants CUDA;
both raise on a NaN in the main process only, when the others may already have stepped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any, Iterable, Mapping, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.engine import SimpleTrainer  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

from dn_detr.checkpoint.reading import CheckpointError  # noqa: E402
from dn_detr.data.categories import DatasetError  # noqa: E402
from dn_detr.data.seeding import seed_generators  # noqa: E402
from dn_detr.engine.distributed import unwrap  # noqa: E402
from dn_detr.engine.failures import (  # noqa: E402
    Batch,
    LocalError,
    NonFiniteError,
    dump_batch,
    explain_out_of_memory,
    is_out_of_memory,
    message_of,
    name_images,
)
from dn_detr.engine.records import recent_metrics, restore_metrics  # noqa: E402
from dn_detr.engine.stopping import StopRequest, agree  # noqa: E402

logger = logging.getLogger(__name__)


class _Part(NamedTuple):
    """One of the accumulated batches of a step, and its losses, without their graph."""

    batch: Batch
    losses: dict[str, Tensor]


class Trainer(SimpleTrainer):
    """Trains a model that returns a dict of losses.

    A step (1) runs `accumulate` batches forward and backward, each loss divided by their number,
    (2) clips the gradient over all parameters together, (3) stops every process if a loss or the
    gradient is not finite, (4) lets the optimizer step. Metrics are those of SimpleTrainer
    (`total_loss`, the losses, `data_time`) and `grad_norm`, the norm before clipping.

    With a seed, all that is random in a step follows from seed, iteration and process, so that a
    resumed training goes on bit by bit as if it had not been stopped.

    Attributes:
        images_seen: number of images trained on, over all processes and resumed trainings.
        stop_signal: the signal by which a process was asked to stop, known to all; 0: none.
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
        seed: int | None = None,
        dump_dir: str | None = None,
        stop_request: StopRequest | None = None,
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
            seed: at least 0; None: the generators are left alone.
            dump_dir: where a batch is written whose loss or gradient is not finite; None: nowhere.
            stop_request: what was asked of this process.
        """
        super().__init__(model, data_loader, optimizer)
        assert accumulate >= 1, accumulate
        self.accumulate = accumulate
        self.clip_grad = dict(clip_grad) if clip_grad is not None else {"max_norm": math.inf}
        self.amp_dtype = amp_dtype
        self.seed = seed
        self.images_seen = 0
        self.stop_signal = 0
        self._dump_dir = None if dump_dir is None else Path(dump_dir)
        self._stop_request = stop_request or StopRequest()
        self._device = next(model.parameters()).device
        self._saved_metrics: Mapping[str, Any] = {}
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Disabled it passes losses and steps through, so that the step below has one form.
        self.grad_scaler = torch.amp.GradScaler(
            self._device.type, enabled=amp_dtype == torch.float16
        )

    def finish(self, max_iter: int) -> None:
        """Does what comes behind the last step, of a training that was ended in between."""
        self.iter = self.start_iter = self.max_iter = max_iter
        with EventStorage(max_iter) as self.storage:
            self.before_train()
            self.after_train()

    def before_train(self) -> None:
        """Has the hooks prepare, with the metrics of a resumed training at hand."""
        restore_metrics(self.storage, self._saved_metrics)
        super().before_train()

    def run_step(self) -> None:
        """One step of the optimizer, see the class.

        Raises:
            NonFiniteError: in every process, before the step; weights are untouched.
            LocalError: in this process: memory, a broken image, a parameter that is not used.
        """
        assert self.model.training, "the model was left in eval mode"
        self.optimizer.zero_grad(set_to_none=True)
        parts, data_time = self._backward_all()
        self._refuse_unused()
        self.after_backward()
        self.grad_scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self._parameters, **self.clip_grad)
        self._exchange(parts, grad_norm, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _seed_forward(self, part: int) -> None:
        """Called once the batch is there, since a new iterator over the data draws numbers, too."""
        if self.seed is not None:
            seed_generators(self.seed, self.iter, comm.get_rank(), part)

    def _backward_all(self) -> tuple[list[_Part], float]:
        """Returns batches and losses of the step, and seconds spent on data."""
        parts, data_time = [], 0.0
        for part in range(self.accumulate):
            start = time.perf_counter()
            batch = self._next_batch()
            data_time += time.perf_counter() - start
            self._seed_forward(part)
            try:
                with self._without_gradient_exchange(part < self.accumulate - 1):
                    losses = self._forward(self.model, batch)
                    total = sum(losses.values()) / self.accumulate
                    self.grad_scaler.scale(total).backward()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                text = explain_out_of_memory(error, batch)
                raise LocalError(f"iteration {self.iter}: {text}") from error
            parts.append(_Part(batch, {name: loss.detach() for name, loss in losses.items()}))
        return parts, data_time

    def _next_batch(self) -> Batch:
        try:
            return next(self._data_loader_iter)
        except DatasetError as error:  # the images of this process; others have no such error
            raise LocalError(message_of(error)) from error

    def _forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        enabled = self.amp_dtype is not None
        with torch.autocast(self._device.type, dtype=self.amp_dtype, enabled=enabled):
            losses = model(batch)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _without_gradient_exchange(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once a step, with the last of the accumulated batches."""
        if wanted and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _refuse_unused(self) -> None:
        """Finds what DistributedDataParallel tells one step later, by number and not by name."""
        model = self.model
        if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
            return
        unused = [
            name
            for name, parameter in model.module.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        if unused:
            raise LocalError(
                f"iteration {self.iter}: the losses do not depend on {len(unused)} parameters: "
                f"{', '.join(unused[:10])}{', ...' if len(unused) > 10 else ''}. Processes would "
                f"wait for their gradients for ever: freeze them (requires_grad=False), or set "
                f"train.ddp.find_unused_parameters=True."
            )

    def _exchange(self, parts: list[_Part], grad_norm: Tensor, data_time: float) -> None:
        """Shares losses, gradient norm and requests to stop among the processes, and records them.

        One transfer of all values from the device, and one exchange.
        """
        names = [*parts[0].losses, "grad_norm"]
        means = [sum(p.losses[name] for p in parts) / len(parts) for name in parts[0].losses]
        values = torch.stack([v.float() for v in [*means, grad_norm]]).tolist()
        metrics = dict(zip(names, values), data_time=data_time, stop=self._stop_request.signal)
        metrics["images"] = sum(len(part.batch) for part in parts)
        self.storage.put_scalar("rank_data_time", data_time)
        gathered = comm.all_gather(metrics)
        self.stop_signal = agree([metrics.pop("stop") for metrics in gathered])
        images = sum(metrics.pop("images") for metrics in gathered)
        data_times = [metrics.pop("data_time") for metrics in gathered]
        self._refuse_non_finite(gathered, parts)
        self.images_seen += images
        if comm.is_main_process():
            self.storage.put_scalar("data_time", max(data_times))
            means = {name: sum(m[name] for m in gathered) / len(gathered) for name in names}
            self.storage.put_scalar("grad_norm", means.pop("grad_norm"))
            self.storage.put_scalar("total_loss", sum(means.values()))
            if "total_loss" not in means:
                self.storage.put_scalars(**means)

    def _refuse_non_finite(self, gathered: list[dict[str, float]], parts: list[_Part]) -> None:
        """Stops all processes alike where a loss of one, or the gradient of all, is not finite."""
        in_losses = any(
            not math.isfinite(value)
            for metrics in gathered
            for name, value in metrics.items()
            if name != "grad_norm"
        )
        # The processes share one gradient, so it is looked at only where all losses are finite.
        grad_norm = gathered[0]["grad_norm"]
        if not in_losses and (math.isfinite(grad_norm) or self._scaler_will_skip()):
            return
        told = comm.all_gather(self._tell_non_finite(parts, in_losses))
        culprits = [text for text in told if text] or [f"grad_norm={grad_norm}, of all processes"]
        raise NonFiniteError(
            f"iteration {self.iter}: {'; '.join(culprits)}. Training stops before the step; the "
            f"weights are those of the iteration before. A smaller optimizer.lr, or "
            f"train.amp.enabled=False, may help."
        )

    def _scaler_will_skip(self) -> bool:
        """A gradient that was scaled for float16 overflows now and then; not at a scale of 1."""
        return self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() > 1

    def _tell_non_finite(self, parts: list[_Part], in_losses: bool) -> str:
        """What is not finite in this process, and with which images; "" where all is."""
        texts = []
        for number, (batch, losses) in enumerate(parts):
            if in_losses:
                bad = [f"{k}={v.item()}" for k, v in losses.items() if not v.isfinite()]
            else:
                self._seed_forward(number)  # the same numbers once more
                bad = self._losses_with_bad_gradient(batch)
            if bad:
                texts.append(self._tell_batch(", ".join(bad), batch, number))
        return "; ".join(texts)

    def _losses_with_bad_gradient(self, batch: Batch) -> list[str]:
        self.optimizer.zero_grad(set_to_none=True)  # makes room
        wanted = [p for p in self._parameters if p.requires_grad]
        bad = []
        try:
            losses = self._forward(unwrap(self.model), batch)  # this process's own gradient
            for name, loss in losses.items():
                if not loss.requires_grad:
                    continue
                gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
                if not all(g.isfinite().all() for g in gradients if g is not None):
                    bad.append(f"gradient of {name}")
        except RuntimeError as error:  # the other processes wait for an answer
            bad.append(f"gradient of a loss that could not be found ({error})")
        return bad

    def _tell_batch(self, what: str, batch: Batch, part: int) -> str:
        rank = comm.get_rank()
        text = f"process {rank}: {what}, with images {name_images(batch)}"
        if self._dump_dir is None:
            return text
        name = f"nonfinite_iter_{self.iter:07d}_process_{rank}"
        path = self._dump_dir / (
            f"{name}_part_{part}.pth" if self.accumulate > 1 else f"{name}.pth"
        )
        return f"{text}; the batch is {dump_batch(batch, path)}"

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, optimizer, images seen, recent metrics, and the scaler of float16."""
        state = super().state_dict()
        state["images_seen"] = self.images_seen
        if hasattr(self, "storage"):
            state["metrics"] = recent_metrics(self.storage)
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; the config's hyper-parameters win over the saved ones.

        A loader that can start anywhere (`dn_detr.data.loader`) is put where the stream of images
        was left.

        Raises:
            CheckpointError: the optimizer groups its parameters in another way.
        """
        self._check_groups(state_dict["optimizer"]["param_groups"])
        configured = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        super().load_state_dict(state_dict)
        for group, options in zip(self.optimizer.param_groups, configured):
            group.update(options)
            if "initial_lr" in group:  # what a scheduler multiplies
                group["initial_lr"] = options["lr"]
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self._saved_metrics = state_dict.get("metrics", {})
        self._place_loader(state_dict.get("images_seen"))

    def _check_groups(self, saved: list[dict[str, Any]]) -> None:
        """The optimizer's state goes by the parameters' order, which follows from the groups."""
        groups = self.optimizer.param_groups
        sizes, own = ([len(g["params"]) for g in each] for each in (saved, groups))
        if sizes != own:
            raise CheckpointError(
                f"the optimizer was saved with groups of {sizes} parameters, and now they are "
                f"{own}: resume with the optimizer.params that it was trained with (such as "
                f"optimizer.params.lr_factor_func), or start anew from the weights "
                f"(train.init_checkpoint=FILE, another train.output_dir)."
            )

    def _place_loader(self, images_seen: int | None) -> None:
        self.images_seen = images_seen or 0
        if images_seen is not None and hasattr(self.data_loader, "start_behind"):
            self.data_loader.start_behind(images_seen)
        else:
            logger.warning(
                "The order of the images starts anew: %s.",
                "the checkpoint does not say how far it was"
                if images_seen is None
                else f"a {type(self.data_loader).__name__} cannot start anywhere else",
            )
