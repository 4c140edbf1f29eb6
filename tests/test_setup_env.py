"""The set-up script's decisions; nothing is installed here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import TextIO

import pytest

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM = "git+https://example.org/detectron2.git@0123"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, its .venv in an empty folder, without pip, compilers or imports."""
    module = load_script()
    venv = tmp_path / ".venv"
    monkeypatch.setattr(module, "VENV", venv)
    monkeypatch.setattr(module, "PYTHON", venv / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", venv / "stamp")

    module.pip_calls = []
    module.detectron2_comes_from = None  # the pip argument that brings a working detectron2

    def make_venv() -> None:
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        module.PYTHON.touch()

    def pip(*arguments: str, **options: object) -> bool:
        module.pip_calls.append(arguments)
        return "broken" not in arguments[-1]

    def has_detectron2() -> bool:
        wanted = module.detectron2_comes_from
        return wanted == "here already" or any(wanted in call for call in module.pip_calls)

    monkeypatch.setattr(module, "make_venv", make_venv)
    module.kernel_builds = 0
    module.lost_kernels = ""

    def lost_kernels() -> str:
        module.kernel_builds += 1
        return module.lost_kernels

    monkeypatch.setattr(module, "_pip", pip)
    monkeypatch.setattr(module, "_lost_kernels", lost_kernels)
    monkeypatch.setattr(module, "_has_package", lambda name: has_detectron2())
    monkeypatch.setattr(module, "_why_not", lambda python: "" if has_detectron2() else "not there")
    return module


def upstream() -> str:
    from dn_detr.requirements import DETECTRON2_SOURCE

    return DETECTRON2_SOURCE


def sources_tried(env: ModuleType) -> list[str]:
    return [c[-1] for c in env.pip_calls if c[0] == "--no-build-isolation" and "-e" not in c]


@pytest.mark.parametrize("version", [(3, 10), (3, 13)])
def test_supported_pythons(env: ModuleType, version: tuple[int, int]) -> None:
    env.check_python(version)


@pytest.mark.parametrize("version", [(3, 9), (3, 14), (2, 7)])
def test_other_pythons_are_refused_with_the_remedy(env: ModuleType, version: tuple) -> None:
    with pytest.raises(
        env.SetupError, match=r"3.10 to 3.13 .* {}.{}\..*\n.*PYTHON=".format(*version)
    ):
        env.check_python(version)


def test_upstream_unless_something_is_named(env: ModuleType) -> None:
    assert env.detectron2_sources({}, UPSTREAM) == [UPSTREAM]
    assert env.detectron2_sources({"DETECTRON2": " "}, UPSTREAM) == [UPSTREAM]
    assert env.detectron2_sources({"DETECTRON2": "a.whl"}, UPSTREAM) == ["a.whl", UPSTREAM]


@pytest.mark.parametrize(
    ("named", "source"),
    [
        ("https://example.org/d.git", "git+https://example.org/d.git"),
        ("https://me@example.org/d.git@main", "git+https://me@example.org/d.git@main"),
        ("git+https://example.org/d.git@0123", "git+https://example.org/d.git@0123"),
        ("ssh://git@example.org/d.git", "git+ssh://git@example.org/d.git"),
        ("https://example.org/d-0.6-cp311.whl", "https://example.org/d-0.6-cp311.whl"),
    ],
)
def test_addresses(env: ModuleType, named: str, source: str) -> None:
    assert env.pip_source(named) == source


def test_folders_and_wheels(env: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "detectron2-0.6.whl"
    wheel.touch()
    assert env.pip_source(str(tmp_path)) == str(tmp_path)
    assert env.pip_source(str(wheel)) == str(wheel)
    with pytest.raises(env.SetupError, match="DETECTRON2=.*nowhere: there is no such"):
        env.pip_source(str(tmp_path / "nowhere"))


def test_one_that_imports_is_kept(env: ModuleType) -> None:
    env.detectron2_comes_from = "here already"
    env.set_up({"DETECTRON2": "https://example.org/other.git"})
    assert sources_tried(env) == []


def test_the_named_one_comes_first(env: ModuleType, tmp_path: Path) -> None:
    env.detectron2_comes_from = str(tmp_path)
    env.set_up({"DETECTRON2": str(tmp_path)})
    assert sources_tried(env) == [str(tmp_path)]


@pytest.mark.parametrize("named", ["nowhere", "https://example.org/broken"])
def test_upstream_where_the_named_one_cannot_be_had(env: ModuleType, named: str) -> None:
    env.detectron2_comes_from = upstream()
    env.set_up({"DETECTRON2": named})
    assert sources_tried(env)[-1] == upstream()


def test_the_reason_of_a_failure_is_one_line(
    env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(*arguments: str, stderr: TextIO, **options: object) -> bool:
        stderr.write("error: subprocess-exited-with-error\n  fatal: unable to access\nnote: ...\n")
        return False

    monkeypatch.setattr(env, "_pip", pip)
    env.make_venv()
    reason = env._pip_for_detectron2("git+https://example.org/d.git")
    assert reason == "fatal: unable to access (all of it: .venv/detectron2-install.log)"


def test_a_second_run_installs_nothing(env: ModuleType) -> None:
    env.detectron2_comes_from = upstream()
    env.set_up({})
    assert len(env.pip_calls) == 4  # build tools, torch, the project, detectron2
    env.set_up({})
    assert len(env.pip_calls) == 4
    assert env.kernel_builds == 1


def test_changed_pins_are_installed(env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    env.detectron2_comes_from = upstream()
    env.set_up({})
    _, kernels, detectron2 = env.stamp_lines(ROOT)
    monkeypatch.setattr(env, "stamp_lines", lambda root: ["another hash", kernels, detectron2])
    env.set_up({})
    assert len(env.pip_calls) == 7  # all but detectron2
    assert env.kernel_builds == 2


def test_changed_kernels_are_built_and_nothing_else(
    env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    env.detectron2_comes_from = upstream()
    env.set_up({})
    project, _, detectron2 = env.stamp_lines(ROOT)
    monkeypatch.setattr(env, "stamp_lines", lambda root: [project, "another hash", detectron2])
    env.set_up({})
    assert len(env.pip_calls) == 4
    assert env.kernel_builds == 2


def test_the_stamp_knows_every_kernel(env: ModuleType, tmp_path: Path) -> None:
    for name in ("requirements.txt", "pyproject.toml", "setup.py"):
        (tmp_path / name).touch()
    kernel = tmp_path / "dn_detr" / "layers" / "csrc" / "cuda" / "forward.cu"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("before")
    before = env.stamp_lines(tmp_path)
    kernel.write_text("after")
    after = env.stamp_lines(tmp_path)
    assert before[0] == after[0] and before[1] != after[1]


def test_lost_kernels_are_said_once(env: ModuleType, capsys: pytest.CaptureFixture) -> None:
    """The set-up goes on; a build that failed is not repeated until something changes."""
    env.detectron2_comes_from = upstream()
    env.lost_kernels = "no kernels were built: there is no C++ compiler"
    env.set_up({})
    said = capsys.readouterr().out
    assert said.count("setup: no kernels were built: there is no C++ compiler\n") == 1
    assert "setup: ready" in said
    env.set_up({})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("printed", "lost"),
    [
        ("g++ ...\ncopying ...\n", ""),
        (
            "g++ ...\ndn_detr: no CUDA kernels were built: nvcc\n    error: x\n  Later\ng++ ...\n",
            "no CUDA kernels were built: nvcc\n    error: x\n  Later\n",
        ),
    ],
)
def test_what_the_build_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, lost: str
) -> None:
    module = load_script()
    monkeypatch.setattr(module, "VENV", tmp_path)

    def run(command: list[str], stdout: TextIO, **options: object) -> bool:
        assert command[1:] == ["setup.py", "build_ext", "--inplace"]
        stdout.write(printed)
        return True

    monkeypatch.setattr(module, "_run", run)
    log = "  (all of it: .venv/kernels-build.log)"
    assert module._lost_kernels() == (lost + log if lost else "")


def test_a_failed_set_up_is_taken_up_again(
    env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    env.detectron2_comes_from = upstream()
    with monkeypatch.context() as patch:
        patch.setattr(env, "_pip", lambda *arguments, **options: False)
        with pytest.raises(env.SetupError, match="run the same command again"):
            env.set_up({})
    env.set_up({})
    assert len(env.pip_calls) == 4


def test_without_detectron2(env: ModuleType, capsys: pytest.CaptureFixture) -> None:
    """One message with the remedy; the next run tries detectron2 again, and nothing else."""
    env.detectron2_comes_from = "nowhere"
    env.set_up({})
    said = capsys.readouterr().out
    assert "detectron2 is missing: not there" in said
    assert "DETECTRON2=" in said and upstream() in said
    before = len(env.pip_calls)
    env.set_up({})
    assert env.pip_calls[before:] == [("--no-build-isolation", upstream())]


def test_without_detectron2_strictly(env: ModuleType) -> None:
    env.detectron2_comes_from = "nowhere"
    with pytest.raises(env.SetupError, match="detectron2 is missing(.|\n)*STRICT=1"):
        env.set_up({"STRICT": "1"})


def test_make_names_the_script_and_its_targets() -> None:
    """`make -n` tells what it would do."""
    # What `make test` hands to the make that a test starts is not for this one.
    environ = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    for target, last in (("demo", "scripts/demo.sh"), ("test", "-m pytest")):
        done = subprocess.run(
            ["make", "-n", target],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            check=True,
        )
        first, second = done.stdout.splitlines()
        assert "scripts/setup_env.py" in first
        assert last in second
