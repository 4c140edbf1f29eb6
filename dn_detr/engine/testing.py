"""Evaluation as `tools/train_net.py` runs it: of a checkpoint, and along a training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import instantiate  # noqa: E402
from detectron2.evaluation import inference_on_dataset, print_csv_format  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from dn_detr.checkpoint.checkpointer import DNCheckpointer  # noqa: E402
from dn_detr.data.categories import DatasetError  # noqa: E402
from dn_detr.data.loader import prepare_workers  # noqa: E402
from dn_detr.engine.config import training_categories  # noqa: E402
from dn_detr.engine.distributed import share_buffers, unwrap  # noqa: E402
from dn_detr.engine.ema import WeightAverage  # noqa: E402
from dn_detr.engine.failures import LocalError, message_of  # noqa: E402
from dn_detr.engine.stopping import StoppableEvaluator, StopRequest  # noqa: E402

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, float]]


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


def evaluate_checkpoint(cfg: DictConfig, path: str) -> Results:
    """Evaluates the weights of a local file; every key of it has to fit the model."""
    model = build_model(cfg)
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
            _Batches(loader, request),
            StoppableEvaluator(instantiate(evaluator), request),
        )
    )


class _Batches:
    """What a loader hands out, until this process is asked to stop.

    Raises:
        LocalError: an image cannot be used; it is one of this process, and others have no error.
    """

    def __init__(self, loader: Iterable[Any], request: StopRequest) -> None:
        self._loader, self._request = loader, request

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in self._loader:
                if self._request.signal:
                    return
                yield batch
        except DatasetError as error:
            raise LocalError(message_of(error)) from error


def build_model(cfg: DictConfig) -> nn.Module:
    """The model of a resolved config, on its device."""
    return instantiate(cfg.model).to(cfg.train.device)
