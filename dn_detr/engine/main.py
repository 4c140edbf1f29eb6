"""What `tools/train_net.py` does in each of its processes."""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path
from typing import Iterator

import numpy as np
import yaml

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.engine import default_setup  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from dn_detr.checkpoint.folder import find_checkpoint  # noqa: E402
from dn_detr.checkpoint.writing import write_text_atomically  # noqa: E402
from dn_detr.engine.config import load_config, refuse_invalid_values, resolve_config  # noqa: E402
from dn_detr.engine.distributed import bound_waiting, on_main_process  # noqa: E402
from dn_detr.engine.files import (  # noqa: E402
    clear_output_dir,
    fetch_weights,
    prepare_output_dir,
    require_checkpoint,
)
from dn_detr.engine.records import forgive_full_disk  # noqa: E402
from dn_detr.engine.stopping import restarted_by_slurm  # noqa: E402
from dn_detr.engine.testing import Results, evaluate_checkpoint  # noqa: E402
from dn_detr.engine.training import Source, Training  # noqa: E402

logger = logging.getLogger(__name__)


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
    refuse_invalid_values(cfg, comm.get_world_size())
    bound_waiting(cfg.train.dist_timeout)
    if args.eval_only:
        require_checkpoint(cfg)
    resume = args.resume or restarted_by_slurm()  # by the very command it was first run with
    on_main_process(prepare_output_dir, cfg, resume=resume, eval_only=args.eval_only)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="dn_detr")
    resolve_config(cfg, comm.get_world_size(), args.eval_only)
    if args.eval_only:
        with _kept_config(cfg):
            default_setup(cfg, args)
        forgive_full_disk()
        return evaluate_checkpoint(cfg, _fetch(cfg))
    cfg.train.seed = on_main_process(_settle_seed, cfg, resume)
    source = _find_source(cfg, resume)
    with _kept_config(cfg, only_after_errors=True):
        default_setup(cfg, args)
        forgive_full_disk()
        training = Training(cfg, source)
    if cfg.train.overwrite and not resume:
        on_main_process(clear_output_dir, cfg)
    return training.run()


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
def _kept_config(cfg: DictConfig, only_after_errors: bool = False) -> Iterator[None]:
    """Leaves the config.yaml of a training as it was."""
    path = Path(cfg.train.output_dir) / "config.yaml"
    text = path.read_text() if comm.is_main_process() and path.is_file() else None
    try:
        yield
        keep = not only_after_errors
    except BaseException:
        keep = True
        raise
    finally:
        if text is not None and keep:
            write_text_atomically(text, path)


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
