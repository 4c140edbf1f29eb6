"""Training as `tools/train_net.py` runs it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Iterable, NamedTuple

import torch
from torch import nn

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import instantiate  # noqa: E402
from detectron2.engine import HookBase, hooks  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from omegaconf import DictConfig, ListConfig  # noqa: E402

from dn_detr.checkpoint.checkpointer import DNCheckpointer, build_metadata  # noqa: E402
from dn_detr.data.check import check_coco  # noqa: E402
from dn_detr.engine.config import training_categories  # noqa: E402
from dn_detr.engine.distributed import on_main_process, wrap_ddp  # noqa: E402
from dn_detr.engine.ema import EMAHook, WeightAverage  # noqa: E402
from dn_detr.engine.failures import LocalError, NonFiniteError, explain  # noqa: E402
from dn_detr.engine.hooks import (  # noqa: E402
    BestCheckpointer,
    FinalCheckpointer,
    PeriodicCheckpointer,
)
from dn_detr.engine.records import EvalHook, RecordWriter  # noqa: E402
from dn_detr.engine.resume import tell_changes  # noqa: E402
from dn_detr.engine.stopping import StopHook, StopRequest, TrainingStopped, requeue  # noqa: E402
from dn_detr.engine.testing import Results, build_model, do_test  # noqa: E402
from dn_detr.engine.trainer import Trainer  # noqa: E402

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """Where the first weights come from: a local file, or "" for random ones."""

    path: str
    resume: bool = False


class Training:
    """A training by a resolved config, ready to run: what can be refused has been."""

    def __init__(self, cfg: DictConfig, source: Source) -> None:
        """Checks the data, builds all parts and loads weights.

        Args:
            cfg: after `resolve_config`; saved as config.yaml in `train.output_dir`.
            source: of the first weights.

        Raises:
            DatasetError, CheckpointError: the data or the weights cannot be used.
        """
        self._cfg = cfg
        loader = instantiate(cfg.dataloader.train)  # checks the training data as it reads them
        on_main_process(_check_validation_data, cfg)
        self._model = build_model(cfg)
        logger.info("Model:\n%s", self._model)
        self._request = StopRequest()
        self._average = (
            WeightAverage(self._model, cfg.train.ema.decay) if cfg.train.ema.enabled else None
        )
        self._trainer = _build_trainer(cfg, self._model, loader, self._request)
        self._checkpointer = _build_checkpointer(cfg, self._trainer, self._average)
        self._results: Results = {}
        self._trainer.register_hooks(self._build_hooks(source.path if source.resume else ""))
        self._start = 0
        if source.resume:
            self._resume(source.path)
        elif source.path:
            self._checkpointer.load_weights(
                source.path, categories=training_categories(cfg), strict=False
            )

    def _resume(self, path: str) -> None:
        rest = self._checkpointer.resume(path, categories=training_categories(self._cfg))
        saved = rest.get("metadata", {}).get("config", "")
        tell_changes(saved, self._checkpointer.metadata["config"])
        self._start = self._trainer.iter + 1
        logger.info("Resuming after %d of %d iterations.", self._start, self._cfg.train.max_iter)

    def run(self) -> Results:
        """Trains, and evaluates along the way and at the end.

        Returns:
            the results of the final evaluation, see `do_test`.

        Raises:
            TrainingStopped: after a signal, in every process alike; all is saved.
            NonFiniteError, LocalError: what else ended it; the message says where it goes on.
        """
        with self._request.listening():
            self._train()
        return self._results

    def _train(self) -> None:
        trainer, seen, max_iter = self._trainer, self._trainer.images_seen, self._cfg.train.max_iter
        try:
            if self._start < max_iter:
                trainer.train(self._start, max_iter)
            else:
                logger.info("Nothing is left to train; a larger train.max_iter would go on.")
                trainer.finish(max_iter)
        except TrainingStopped as stopped:
            if trainer.images_seen > seen and trainer.iter < max_iter:
                self._save_now()
            comm.synchronize()  # whoever ends first takes the others with it
            logger.warning(
                "%s: the training stops. %s", stopped.signal.name, self._where_to_go_on()
            )
            if comm.is_main_process():
                requeue(stopped.signal)
            raise
        except (LocalError, NonFiniteError) as error:
            error.args = (f"{error} {self._where_to_go_on()}",)
            raise
        except RuntimeError as error:
            text = explain(error)
            if text is None:
                raise
            text = f"iteration {trainer.iter}: {text} {self._where_to_go_on()}"
            raise LocalError(text) from error

    def _save_now(self) -> None:
        for hook in self._trainer._hooks:
            if isinstance(hook, PeriodicCheckpointer):
                hook.save_now()

    def _where_to_go_on(self) -> str:
        if not self._checkpointer.has_checkpoint():
            return "No checkpoint was saved yet."
        path = self._checkpointer.get_checkpoint_file()
        return f"The last checkpoint is {path}: --resume goes on there."

    def _build_hooks(self, resumed_from: str) -> list[HookBase | None]:
        """Hooks in the order of detectron2's lazyconfig_train_net.py; files: the main process."""
        cfg, train, is_main = self._cfg, self._cfg.train, comm.is_main_process()
        files, metric = self._checkpointer, train.best_metric
        return [
            hooks.IterationTimer(),
            EMAHook(self._average) if self._average is not None else None,
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            PeriodicCheckpointer(files, **train.checkpointer) if is_main else None,
            EvalHook(train.eval_period, self._evaluate),
            BestCheckpointer(files, metric, train.eval_period) if is_main else None,
            RecordWriter(train.output_dir, train.max_iter, train.log_period) if is_main else None,
            FinalCheckpointer(files, resumed_from) if is_main else None,
            StopHook(),
        ]

    def _evaluate(self) -> Results:
        average = self._average
        if average is not None and not average.updates:  # it was off till now
            average = None
        self._results.update(do_test(self._cfg, self._model, average, self._request))
        return self._results


def _check_validation_data(cfg: DictConfig) -> None:
    """Finds at the start what would otherwise stop the first evaluation, hours later."""
    check_coco(cfg.dataset.val.json, cfg.dataset.val.images)


def _build_trainer(
    cfg: DictConfig, model: nn.Module, train_loader: Iterable[Any], request: StopRequest
) -> Trainer:
    optimizer = _build_optimizer(cfg, model)
    train = cfg.train
    return Trainer(
        wrap_ddp(model, **train.ddp),
        train_loader,
        optimizer,
        accumulate=train.accumulate,
        clip_grad=train.clip_grad.params if train.clip_grad.enabled else None,
        amp_dtype=getattr(torch, train.amp.dtype) if train.amp.enabled else None,
        seed=train.seed,
        dump_dir=train.output_dir,
        stop_request=request,
    )


def _build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    del cfg.optimizer.params.model  # the config stays one that can be saved
    for group in optimizer.param_groups:
        # Checkpoints hold plain Python only, and betas=(0.9, 0.999) is a ListConfig in a config.
        group.update({k: tuple(v) for k, v in group.items() if isinstance(v, ListConfig)})
    return optimizer


def _build_checkpointer(
    cfg: DictConfig, trainer: Trainer, average: WeightAverage | None
) -> DNCheckpointer:
    folder = cfg.train.output_dir
    # Only the main process has the file where machines have disks of their own.
    config = on_main_process((Path(folder) / "config.yaml").read_text, encoding="utf-8")
    metadata = build_metadata(config, training_categories(cfg))
    extra: dict[str, Any] = {"trainer": trainer}
    if average is not None:
        extra["ema"] = average
    return DNCheckpointer(trainer.model, folder, metadata=metadata, **extra)
