"""Training and evaluation as `tools/train_net.py` runs them."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import instantiate  # noqa: E402
from detectron2.engine import HookBase, default_setup, hooks  # noqa: E402
from detectron2.evaluation import inference_on_dataset, print_csv_format  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402
from omegaconf import DictConfig, ListConfig, OmegaConf  # noqa: E402

from dn_detr.checkpoint.checkpointer import DNCheckpointer, build_metadata  # noqa: E402
from dn_detr.checkpoint.folder import find_checkpoint  # noqa: E402
from dn_detr.checkpoint.writing import write_text_atomically  # noqa: E402
from dn_detr.data.check import check_coco  # noqa: E402
from dn_detr.data.loader import prepare_workers  # noqa: E402
from dn_detr.engine.config import load_config, resolve_config, training_categories  # noqa: E402
from dn_detr.engine.distributed import (  # noqa: E402
    on_main_process,
    share_buffers,
    unwrap,
    wrap_ddp,
)
from dn_detr.engine.ema import EMAHook, WeightAverage  # noqa: E402
from dn_detr.engine.failures import LocalError, NonFiniteError, explain  # noqa: E402
from dn_detr.engine.files import (  # noqa: E402
    fetch_weights,
    prepare_output_dir,
    require_checkpoint,
)
from dn_detr.engine.hooks import (  # noqa: E402
    BestCheckpointer,
    FinalCheckpointer,
    PeriodicCheckpointer,
)
from dn_detr.engine.records import EvalHook, RecordWriter, forgive_full_disk  # noqa: E402
from dn_detr.engine.resume import tell_changes  # noqa: E402
from dn_detr.engine.stopping import (  # noqa: E402
    StoppableEvaluator,
    StoppableLoader,
    StopHook,
    StopRequest,
    TrainingStopped,
    requeue,
    restarted_by_slurm,
)
from dn_detr.engine.trainer import Trainer  # noqa: E402

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, float]]


class Source(NamedTuple):
    """Where the first weights come from: a local file, or "" for random ones."""

    path: str
    resume: bool = False


def main(args: argparse.Namespace) -> Results:
    """Trains, or evaluates with `args.eval_only`, in this process.

    Args:
        args: of detectron2's `default_argument_parser`: config_file, opts, resume, eval_only.

    Returns:
        the results of the (final) evaluation, see `do_test`.

    Raises:
        ConfigError: what the user asked for cannot be done.
        TrainingStopped: after a signal; all is saved.
    """
    cfg = load_config(args.config_file, args.opts)
    if args.eval_only:
        require_checkpoint(cfg)
    resume = args.resume or restarted_by_slurm()  # by the very command it was first run with
    on_main_process(prepare_output_dir, cfg, resume=resume, eval_only=args.eval_only)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="dn_detr")
    resolve_config(cfg, comm.get_world_size(), args.eval_only)
    if args.eval_only:
        with _kept(os.path.join(cfg.train.output_dir, "config.yaml")):
            default_setup(cfg, args)
        forgive_full_disk()
        return evaluate_checkpoint(cfg)
    cfg.train.seed = on_main_process(_settle_seed, cfg, resume)
    source = _find_source(cfg, resume)  # before config.yaml is replaced
    default_setup(cfg, args)
    forgive_full_disk()
    return do_train(cfg, source)


def _settle_seed(cfg: DictConfig, resume: bool) -> int:
    """The seed, where none is given (negative) a random one, or that of the resumed training."""
    if cfg.train.seed >= 0:
        return cfg.train.seed
    config = Path(cfg.train.output_dir) / "config.yaml"
    if resume and config.is_file():
        seed = OmegaConf.create(yaml.safe_load(config.read_text())).train.seed
        if seed >= 0:
            return seed
    return int(np.random.SeedSequence().generate_state(1)[0] >> 1)


@contextlib.contextmanager
def _kept(path: str) -> Iterator[None]:
    """Leaves a file as it was: the config of a training outlives an evaluation in its folder."""
    text = None
    if comm.is_main_process() and os.path.exists(path):
        with open(path) as file:
            text = file.read()
    try:
        yield
    finally:
        if text is not None:
            write_text_atomically(text, path)


def do_train(cfg: DictConfig, source: Source) -> Results:
    """Trains by a resolved config, and evaluates along the way and at the end.

    Args:
        cfg: after `resolve_config`; saved as config.yaml in `train.output_dir`.
        source: of the first weights.

    Returns:
        the results of the final evaluation, see `do_test`.
    """
    train_loader = instantiate(cfg.dataloader.train)  # checks the training data as it reads them
    on_main_process(_check_validation_data, cfg)
    model = _build_model(cfg)
    logger.info("Model:\n%s", model)
    request = StopRequest()
    trainer = _build_trainer(cfg, model, train_loader, request)
    average = WeightAverage(model, cfg.train.ema.decay) if cfg.train.ema.enabled else None
    checkpointer = _build_checkpointer(cfg, trainer, average)
    results: Results = {}
    trainer.register_hooks(_build_hooks(cfg, trainer, checkpointer, average, results, request))
    start = 0
    if source.resume:
        rest = checkpointer.resume(source.path, categories=training_categories(cfg))
        tell_changes(rest.get("metadata", {}).get("config", ""), checkpointer.metadata["config"])
        start = trainer.iter + 1
        logger.info("Resuming after %d of %d iterations.", start, cfg.train.max_iter)
        if start >= cfg.train.max_iter:
            logger.info("Nothing is left to train; a larger train.max_iter would go on.")
            averaged = average is not None and average.updates > 0  # not if it was off till now
            return do_test(cfg, model, average if averaged else None)
    elif source.path:
        checkpointer.load_weights(source.path, categories=training_categories(cfg), strict=False)
    with request.listening():
        _train(trainer, start, cfg.train.max_iter, checkpointer)
    return results


def _train(trainer: Trainer, start: int, max_iter: int, checkpointer: DNCheckpointer) -> None:
    """Trains; where that ends early, saves what there is, and says where it goes on from."""
    seen = trainer.images_seen
    try:
        trainer.train(start, max_iter)
    except TrainingStopped as stopped:
        if trainer.images_seen > seen and trainer.iter < max_iter:
            _save_now(trainer)
        comm.synchronize()  # whoever ends first takes the others with it
        logger.warning(
            "%s: the training stops. %s", stopped.signal.name, _where_to_go_on(checkpointer)
        )
        if comm.is_main_process():
            requeue(stopped.signal)
        raise
    except (LocalError, NonFiniteError) as error:
        error.args = (f"{error} {_where_to_go_on(checkpointer)}",)
        raise
    except RuntimeError as error:
        text = explain(error)
        if text is None:
            raise
        text = f"iteration {trainer.iter}: {text} {_where_to_go_on(checkpointer)}"
        raise LocalError(text) from error


def _save_now(trainer: Trainer) -> None:
    for hook in trainer._hooks:
        if isinstance(hook, PeriodicCheckpointer):
            hook.save_now()


def _where_to_go_on(checkpointer: DNCheckpointer) -> str:
    if not checkpointer.has_checkpoint():
        return "No checkpoint was saved yet."
    return f"The last checkpoint is {checkpointer.get_checkpoint_file()}: --resume goes on there."


def do_test(
    cfg: DictConfig,
    model: nn.Module,
    average: WeightAverage | None = None,
    request: StopRequest | None = None,
) -> Results:
    """Evaluates a model on `dataset.val`, and its averaged weights beside it.

    Args:
        cfg: a resolved config.
        model: on its device; DistributedDataParallel is looked through, since the processes may
            have different numbers of images.
        average: evaluated too, if given.
        request: ends the evaluation, too, once this process is asked to stop.

    Returns:
        `{"bbox": {"AP": 0..100, ...}}` and, with `average`, `"bbox_ema"`; empty in all but the main
        process.

    Raises:
        TrainingStopped: after a signal, in every process alike.
    """
    request = request or StopRequest()
    results = _evaluate(cfg, unwrap(model), request)
    if average is not None:
        logger.info("The same with the averaged weights:")
        averaged = _evaluate(cfg, average.model, request, suffix="_ema")
        results.update({f"{task}_ema": metrics for task, metrics in averaged.items()})
    if comm.is_main_process():
        print_csv_format(results)
    return results


def evaluate_checkpoint(cfg: DictConfig) -> Results:
    """Evaluates the checkpoint `train.init_checkpoint`; every key of it has to fit the model."""
    model = _build_model(cfg)
    path = _fetch(cfg)
    categories = training_categories(cfg, eval_only=True)
    rest = DNCheckpointer(model).load_weights(path, categories=categories, strict=True)
    average = None
    if cfg.train.ema.enabled and "ema" in rest:
        average = WeightAverage(model, cfg.train.ema.decay)
        average.load_state_dict(rest["ema"])
    elif cfg.train.ema.enabled:
        logger.info("%s holds no averaged weights: only the raw ones are evaluated.", path)
    return do_test(cfg, model, average)


def _evaluate(cfg: DictConfig, model: nn.Module, request: StopRequest, suffix: str = "") -> Results:
    share_buffers(model)
    loader = instantiate(cfg.dataloader.test)
    if isinstance(loader, DataLoader):
        prepare_workers(loader)
    evaluator = dict(cfg.dataloader.evaluator)
    if evaluator.get("output_dir"):
        evaluator["output_dir"] += suffix  # predictions of both sets of weights are kept
    return dict(
        inference_on_dataset(
            model,
            StoppableLoader(loader, request),
            StoppableEvaluator(instantiate(evaluator), request),
        )
    )


def _check_validation_data(cfg: DictConfig) -> None:
    """Finds at the start what would otherwise stop the first evaluation, hours later."""
    check_coco(cfg.dataset.val.json, cfg.dataset.val.images)


def _build_model(cfg: DictConfig) -> nn.Module:
    return instantiate(cfg.model).to(cfg.train.device)


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


def _build_hooks(
    cfg: DictConfig,
    trainer: Trainer,
    checkpointer: DNCheckpointer,
    average: WeightAverage | None,
    results: Results,
    request: StopRequest,
) -> list[HookBase | None]:
    """Hooks in the order of detectron2's lazyconfig_train_net.py; files: the main process only."""
    train, is_main = cfg.train, comm.is_main_process()

    def evaluate() -> Results:
        results.update(do_test(cfg, trainer.model, average, request))
        return results

    return [
        hooks.IterationTimer(),
        EMAHook(average) if average is not None else None,
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        PeriodicCheckpointer(checkpointer, **train.checkpointer) if is_main else None,
        EvalHook(train.eval_period, evaluate),
        BestCheckpointer(checkpointer, train.best_metric, train.eval_period) if is_main else None,
        RecordWriter(train.output_dir, train.max_iter, train.log_period) if is_main else None,
        FinalCheckpointer(checkpointer) if is_main else None,
        StopHook(),
    ]


def _find_source(cfg: DictConfig, resume: bool) -> Source:
    """Finds what training starts from, before anything expensive is done."""
    folder, init = cfg.train.output_dir, cfg.train.init_checkpoint
    last = on_main_process(find_checkpoint, folder) if resume else None
    if last:
        return Source(last, resume=True)
    if resume:
        logger.info("Nothing to resume in %s: starting from %s.", folder, init or "random weights")
    elif not init:
        logger.info("Training from scratch (train.init_checkpoint is empty).")
    return Source(_fetch(cfg))


def _fetch(cfg: DictConfig) -> str:
    """The local file of `train.init_checkpoint`, fetched once a machine."""
    path = cfg.train.init_checkpoint
    on_main_process(fetch_weights, path)
    return fetch_weights(path)
