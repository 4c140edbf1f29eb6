"""Processes that start warm: forked from one server that has imported detectron2 already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Callable

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.warm"])


def start(function: Callable[..., Any], *args: Any, folder: Path, name: str = "") -> BaseProcess:
    """Starts `function(*args)` in a process of its own, with `folder` as its working directory.

    What it prints goes to `folder/stdout{name}` and `folder/stderr{name}`; its exit status is that
    of a script: 0, 1 after an exception (with the traceback in stderr), or what `sys.exit` says.
    """
    process = _CONTEXT.Process(target=_run, args=(function, args, str(folder), name))
    process.start()
    return process


def start_ranks(
    count: int, function: Callable[..., Any], *args: Any, folder: Path, seconds: float = 60
) -> list[BaseProcess]:
    """Starts `function(*args)` in `count` processes of one gloo group on the CPU, see `start`.

    `seconds`: after which a process that waits for the others gives up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    return [
        start(_join, rank, count, url, seconds, function, args, folder=folder, name=str(rank))
        for rank in range(count)
    ]


def _join(
    rank: int,
    count: int,
    url: str,
    seconds: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    from detectron2.engine.launch import _distributed_worker

    _distributed_worker(rank, function, count, count, 0, url, args, timedelta(seconds=seconds))


def finish(process: BaseProcess, seconds: float = 60) -> int:
    """Waits for the end, and kills the process (and fails) where that takes too long.

    Returns:
        the exit status; negative: the signal that ended the process.
    """
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"process {process.pid} still ran after {seconds} s")
    return process.exitcode


def _run(function: Callable[..., Any], args: tuple[Any, ...], folder: str, name: str) -> None:
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # a loader's workers, as in any script
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        with open(f"{stream}{name}", "ab") as file:
            os.dup2(file.fileno(), descriptor)
    try:
        function(*args)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        sys.stderr.flush()
        os._exit(1 if isinstance(error.code, str) else error.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
