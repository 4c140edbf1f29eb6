"""What ends a training: signals, and processes that fail, hang or cannot meet."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine import default_argument_parser

from dn_detr.data.shapes import generate_shapes
from dn_detr.engine import launch, stopping
from dn_detr.engine.launch import guarded_main
from dn_detr.engine.launch import run as run_script

from tests.processes import finish, start, start_ranks

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "tests" / "engine" / "tiny_config.py")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    generate_shapes(folder, size=32, num_train=12, num_val=5, seed=0)
    return [f"dataset.root={folder}", "dataset.generate=null"]


def run(options):
    guarded_main(default_argument_parser().parse_args(["--config-file", CONFIG, *options]))


def failing(how, *options):
    target = "model._target_=tests.engine.tiny.Fails"
    periods = ["train.checkpointer.period=1", "train.eval_period=0"]
    return ["train.output_dir=out", target, f"+model.how={how}", *periods, *options]


def last_line(folder, rank=""):
    return (folder / f"stderr{rank}").read_text().strip().splitlines()[-1]


GOES_ON = "The last checkpoint is out/model_0000001.pth: --resume goes on there."


def assert_goes_on(folder, shapes):
    """The checkpoint that was there is whole, and training goes on from it."""
    assert (folder / "out" / "last_checkpoint").read_text() == "model_0000001.pth"
    options = ["--resume", "train.output_dir=out", *shapes]
    assert finish(start(run, options, folder=folder)) == 0
    assert torch.load(folder / "out" / "model_final.pth", weights_only=True)["iteration"] == 5


@pytest.mark.fault(55)
def test_out_of_memory(shapes, tmp_path):
    options = failing("use_all_memory", *shapes)
    assert finish(start(run, options, folder=tmp_path)) == 1
    message = last_line(tmp_path)
    assert message.startswith("error: iteration 2: out of memory with 4 images")
    assert "the largest is 32x32 pixels" in message and message.endswith(GOES_ON)
    assert_goes_on(tmp_path, shapes)


@pytest.mark.fault(58)
def test_a_killed_worker(shapes, tmp_path):
    began = time.monotonic()
    options = failing("kill_worker", *shapes, "dataloader.train.num_workers=1")
    assert finish(start(run, options, folder=tmp_path)) == 1
    assert time.monotonic() - began < 10
    message = last_line(tmp_path)
    assert message.startswith("error: iteration ")
    assert "a process that loads data was ended from outside: DataLoader worker (pid" in message
    assert "dataloader.train.num_workers=N" in message and "/dev/shm" in message
    assert "--resume goes on there." in message


@pytest.mark.fault(57)
def test_a_second_ctrl_c_ends_at_once(shapes, tmp_path):
    began = time.monotonic()
    assert finish(start(run, failing("ask_twice", *shapes), folder=tmp_path)) != 0
    assert time.monotonic() - began < 30
    assert "KeyboardInterrupt" in (tmp_path / "stderr").read_text()
    assert_goes_on(tmp_path, shapes)


@pytest.mark.fault(59)
@pytest.mark.parametrize("how", ["exit", "hang"])
def test_a_process_that_ends_or_hangs_ends_the_other(shapes, tmp_path, how):
    ranks = start_ranks(2, run, failing(how, *shapes), folder=tmp_path, seconds=5)
    began = time.monotonic()
    assert finish(ranks[0], seconds=30) == 1
    assert time.monotonic() - began < 20
    ranks[1].kill()
    message = last_line(tmp_path, rank=0)
    assert message.startswith("error: iteration 2: another process ended or did not answer in time")
    assert "train.dist_timeout" in message and message.endswith(GOES_ON)
    assert_goes_on(tmp_path, shapes)


@pytest.mark.fault(44)
@pytest.mark.fault(59)
@pytest.mark.parametrize("loader", ["train", "test"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_one_process_is_told_by_it(shapes, tmp_path, loader, workers):
    options = [*shapes, "train.output_dir=out", f"dataloader.{loader}.num_workers={workers}"]
    refuses = "tests.integration.test_stops.RefusesInProcessOne"
    options += [f"dataloader.{loader}.mapper._target_={refuses}"]
    ranks = start_ranks(2, run, options, folder=tmp_path, seconds=5)
    assert [finish(rank, seconds=30) for rank in ranks] == [1, 1]
    assert last_line(tmp_path, rank=1).startswith("error (process 1): The image ")


class RefusesInProcessOne:
    """A mapper whose images cannot be read by the second process."""

    def __init__(self, **kwargs):
        from dn_detr.data.mapper import DetrDatasetMapper

        self.mapper = DetrDatasetMapper(**kwargs)

    def __call__(self, item):
        from detectron2.utils import comm

        name = "/none.png" if comm.get_rank() == 1 else item["file_name"]
        return self.mapper({**item, "file_name": name})


@pytest.mark.fault(61)
def test_parameters_without_a_gradient_are_named(shapes, tmp_path):
    ranks = start_ranks(2, run, failing("unused", *shapes), folder=tmp_path)
    assert [finish(rank) for rank in ranks] == [1, 1]
    message = last_line(tmp_path, rank=0)
    assert "iteration 0: the losses do not depend on 2 parameters: extra.weight, extra.bias" in (
        message
    )
    assert "train.ddp.find_unused_parameters=True" in message
    more = ["train.ddp.find_unused_parameters=True", "train.overwrite=True"]
    ranks = start_ranks(2, run, failing("unused", *shapes, *more), folder=tmp_path)
    assert [finish(rank) for rank in ranks] == [0, 0]


@pytest.mark.fault(25)
def test_records_that_cannot_be_written_cost_a_warning(shapes, tmp_path):
    assert finish(start(run, failing("fill_disk", *shapes), folder=tmp_path)) == 0
    said = (tmp_path / "stdout").read_text() + (tmp_path / "stderr").read_text()
    for writer in ("JSONWriter", "TensorboardXWriter"):
        assert f"{writer} cannot write to out ([Errno 28] No space left on device)" in said
    assert said.count("The log cannot be written (disk full?)") == 1
    assert "Logging error" not in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").open()]
    assert [row["iteration"] for row in rows] == [0, 1]
    assert torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["iteration"] == 5


def command(*options, cwd, env=None):
    """Starts the very command line, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", CONFIG, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


@pytest.mark.fault(56)
@pytest.mark.fault(57)
@pytest.mark.parametrize(
    "processes, number, to_group",
    [(1, signal.SIGINT, True), (2, signal.SIGTERM, False), (2, signal.SIGUSR2, True)],
)
def test_signals_to_the_command(shapes, tmp_path, processes, number, to_group):
    """To the process that was started, as `kill` does, or to all of them, as terminal and Slurm."""
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    fake.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "42", "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}
    options = [*shapes, "train.output_dir=out", "train.max_iter=100000", "train.log_period=1000"]
    options += ["train.eval_period=0", "train.checkpointer.period=100000"]
    options += ["dataloader.train.num_workers=1"]
    if processes > 1:
        options = ["--num-gpus", str(processes), *options]
    process = command(*options, cwd=tmp_path, env=slurm)
    wait_for(tmp_path / "out" / "metrics.json", process)
    time.sleep(1)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    name = (tmp_path / "out" / "last_checkpoint").read_text()
    stored = torch.load(tmp_path / "out" / name, weights_only=True)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"{number.name}: the training stops. The last checkpoint is out/{name}" in log
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == (
        "requeue 42\n" if number == signal.SIGUSR2 else ""
    )
    if number == signal.SIGUSR2:
        # Slurm runs the same command again, without --resume.
        more = [f"train.max_iter={stored['iteration'] + 2}"]
        again = command(*options, *more, cwd=tmp_path, env={**slurm, "SLURM_RESTART_COUNT": "1"})
        _, errors = again.communicate(timeout=90)
        assert again.returncode == 0, errors
        final = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
        assert final["iteration"] == stored["iteration"] + 1


@pytest.mark.fault(60)
def test_a_taken_port_is_refused_at_once(shapes):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        url = f"tcp://127.0.0.1:{port}"
        with pytest.raises(SystemExit, match=f"error: --dist-url {url}: port {port} is in use"):
            run_script(["--config-file", CONFIG, "--num-gpus", "2", "--dist-url", url, *shapes])


@pytest.mark.fault(60)
def test_srun_with_a_task_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(SystemExit, match="srun runs this script 8 times .*--ntasks-per-node=1"):
        run_script(["--config-file", CONFIG])


@pytest.mark.fault(60)
@pytest.mark.fault(59)
def test_a_machine_that_never_comes(shapes, tmp_path):
    """The others do not wait for ever."""
    options = ["--num-machines", "2", "--dist-url", "tcp://127.0.0.1:0", *shapes]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options[3] = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    process = command(*options, "train.dist_timeout=2", cwd=tmp_path)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: another process ended or did not answer in time")
    assert options[3] in last


def test_processes_agree_on_one_signal():
    assert stopping.agree([0, 0]) == 0
    assert stopping.agree([signal.SIGTERM, 0, signal.SIGUSR2]) == signal.SIGUSR2
    assert stopping.agree([signal.SIGTERM, signal.SIGINT]) == signal.SIGINT


def test_a_failing_requeue_is_said(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("PATH", str(tmp_path))
    stopping.requeue(signal.SIGTERM)
    assert not caplog.text
    stopping.requeue(signal.SIGUSR2)
    assert "scontrol requeue 5_3 failed" in caplog.text and "Submit it again." in caplog.text


def wait_beside_nccl():
    """What a process does on GPUs: here with gloo, that says it was NCCL."""
    import torch.distributed as dist

    from detectron2.utils import comm

    from dn_detr.engine.distributed import bound_waiting

    dist.get_backend = lambda group=None: "nccl"
    bound_waiting(2)
    if comm.get_rank() == 1:
        time.sleep(20)
    comm.all_gather("here")


@pytest.mark.fault(59)
def test_waiting_is_bounded_beside_nccl(tmp_path):
    ranks = start_ranks(2, wait_beside_nccl, folder=tmp_path)
    began = time.monotonic()
    assert finish(ranks[0]) == 1
    assert time.monotonic() - began < 15
    ranks[1].kill()
    assert "Timed out waiting 2000ms" in (tmp_path / "stderr0").read_text()


def test_a_signal_before_the_first_process_ends_the_command(monkeypatch):
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [])
    with pytest.raises(SystemExit) as info, stopping.forwarding():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert info.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.fault(57)
def test_ctrl_c_counts_by_itself():
    request = stopping.StopRequest()
    with request.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the terminal's, beside the one handed on
        assert request.signal == signal.SIGTERM
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)


@pytest.mark.fault(57)
def test_an_interrupted_command_has_the_usual_status(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dn_detr.engine.launch.guarded_main", interrupt)
    with pytest.raises(SystemExit) as info:
        run_script(["--config-file", CONFIG])
    assert info.value.code == 130


@pytest.mark.parametrize(
    "code, asked, status",
    [(1, 0, 1), (143, 0, 143), (-9, 0, 137), (143, signal.SIGINT, 130), (-15, signal.SIGINT, 130)],
)
def test_status_of_the_command(code, asked, status):
    """That of the process that failed, or of the signal that the command itself got."""
    assert launch._exit_status(code, asked) == status


def test_pythons_helper_is_started_deaf_to_slurms_warning(monkeypatch):
    seen = []
    monkeypatch.setattr(
        stopping.resource_tracker,
        "ensure_running",
        lambda: seen.append(signal.getsignal(signal.SIGUSR2)),
    )
    before = signal.getsignal(signal.SIGUSR2)
    stopping.shield_resource_tracker()
    assert seen == [signal.SIG_IGN]
    assert signal.getsignal(signal.SIGUSR2) == before
