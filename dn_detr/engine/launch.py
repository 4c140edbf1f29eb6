"""The command line: processes, and errors as one message."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import socket
import sys
import time
import traceback
from datetime import timedelta
from urllib.parse import urlparse

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.engine import default_argument_parser  # noqa: E402
from detectron2.engine import launch as launch_processes  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from dn_detr.checkpoint.reading import CheckpointError  # noqa: E402
from dn_detr.data.categories import DatasetError  # noqa: E402
from dn_detr.engine.config import load_config, refuse_invalid_values  # noqa: E402
from dn_detr.engine.distributed import SharedError, leave_group  # noqa: E402
from dn_detr.engine.failures import explain, message_of  # noqa: E402
from dn_detr.engine.main import main  # noqa: E402
from dn_detr.engine.overrides import ConfigError  # noqa: E402
from dn_detr.engine.stopping import (  # noqa: E402
    TrainingStopped,
    forwarding,
    shield_resource_tracker,
)
from dn_detr.evaluation.checking import EvaluationError  # noqa: E402

# All processes raise these alike, so one of them reports.
SYMMETRIC_ERRORS = (
    ConfigError,
    DatasetError,
    CheckpointError,
    EvaluationError,
    SharedError,
    FloatingPointError,
)


def run(argv: list[str] | None = None, epilog: str | None = None) -> None:
    """Parses detectron2's command line and trains or evaluates with it.

    What a user can mend ends with `error: ...` on stderr and exit status 1.

    Args:
        argv: without the program's name; None: `sys.argv`.
        epilog: examples below the help text.
    """
    parser = default_argument_parser(epilog)
    # The port detectron2 derives from the user's id makes two trainings on a machine collide.
    parser.set_defaults(dist_url="auto")
    args = parser.parse_args(argv)
    try:
        timeout = _prepare(args)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    shield_resource_tracker()
    try:
        if args.num_gpus * args.num_machines <= 1:
            guarded_main(args)
        else:
            _start_processes(args, timeout)
    except KeyboardInterrupt:
        sys.exit(130)


def _start_processes(args: argparse.Namespace, timeout: timedelta) -> None:
    """Runs `guarded_main` in this machine's processes; ends as the first of them that failed."""
    # Its warning that the other processes are ended would stand below the message that says why.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with forwarding() as request:
        try:
            launch_processes(
                guarded_main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
                timeout=timeout,
            )
        except ProcessExitedException as error:  # the process has said why
            killed = error.exit_code < 0 and not request.signal
            if killed:
                print(
                    f"error: process {error.error_index} was ended by {error.signal_name} from "
                    f"outside; the others were ended, too. Has the machine no memory left (dmesg)? "
                    f"--resume goes on from the last checkpoint.",
                    file=sys.stderr,
                )
            sys.exit(_exit_status(error.exit_code, request.signal))
        except ProcessRaisedException as error:
            text = explain(RuntimeError(str(error).strip().splitlines()[-1]))
            if text is None:
                raise
            sys.exit(f"error: {text} (--dist-url {args.dist_url})")
    if request.signal:
        sys.exit(128 + request.signal)


def _exit_status(code: int, stop_signal: int) -> int:
    if stop_signal:
        return 128 + stop_signal
    return 128 - code if code < 0 else code


def guarded_main(args: argparse.Namespace) -> None:
    """`main`, in one process, with a user's errors as one message."""
    try:
        main(args)
        leave_group()
    except TrainingStopped:
        leave_group()
        raise
    except Exception as error:
        if not _is_ours(error):
            raise
        if comm.get_rank() == 0:
            sys.exit(f"error: {message_of(error)}")
        if not isinstance(error, SYMMETRIC_ERRORS) or str(error).startswith("Caught "):
            time.sleep(1)  # if the main process has the same to say, it says it alone
            sys.exit(f"error (process {comm.get_rank()}): {message_of(error)}")
        # The first process to end takes the others with it: leave that to the one that reports.
        time.sleep(10)
        sys.exit(1)


def _is_ours(error: Exception) -> bool:
    """Whether dn_detr itself raised the error, with a message for the user."""
    if type(error).__module__.split(".")[0] == "dn_detr":
        return True
    if not isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    # A ValueError of a statement that raises nothing itself, such as int("x"), is a bug.
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    raised = not isinstance(error, ValueError) or line.startswith("raise")
    return raised and frame.f_globals.get("__name__", "").split(".")[0] == "dn_detr"


def _prepare(args: argparse.Namespace) -> timedelta:
    """Checks the command line before processes are started, and picks their devices.

    Returns:
        how long processes wait for each other.

    Raises:
        ConfigError: the number of processes or machines does not fit, or their port is taken.
    """
    _refuse_other_launchers(args)
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(
            f"--machine-rank {args.machine_rank} is not in 0..{args.num_machines - 1} "
            f"(--num-machines {args.num_machines})."
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ConfigError(
            "several machines need an address of the first: --dist-url tcp://HOST:PORT"
        )
    if args.num_gpus * args.num_machines <= 1:
        return timedelta()
    cfg = load_config(args.config_file, args.opts)
    refuse_invalid_values(cfg, args.num_gpus * args.num_machines)
    if args.machine_rank == 0:
        _refuse_taken_port(args.dist_url)
    if str(cfg.train.device) == "cpu":
        # detectron2 takes NCCL wherever it sees a GPU, and NCCL cannot send what lies on the CPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {args.num_gpus}, but torch finds {torch.cuda.device_count()} GPUs. "
            f"Processes on the CPU: train.device=cpu"
        )
    return timedelta(seconds=cfg.train.dist_timeout)


def _refuse_other_launchers(args: argparse.Namespace) -> None:
    """Each of their processes would be a training of its own, all of them in one folder."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "this script starts its own processes: run it with python and --num-gpus N, "
            "not torchrun."
        )
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks > 1 and args.num_machines != tasks:
        raise ConfigError(
            f"srun runs this script {tasks} times (SLURM_STEP_NUM_TASKS): run one task a machine "
            f"(srun --ntasks-per-node=1), and give it --num-gpus N --num-machines {tasks} "
            f"--machine-rank $SLURM_PROCID --dist-url tcp://HOST:PORT."
        )


def _refuse_taken_port(dist_url: str) -> None:
    address = urlparse(dist_url)
    if address.scheme != "tcp" or not address.port:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", address.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"--dist-url {dist_url}: port {address.port} is in use here, maybe by another "
                    f"training. Take another one, on all machines; on a single machine leave "
                    f"--dist-url out."
                ) from error
