"""What setup.py builds of dn_detr._C: where there is everything, and where something is missing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = Path("dn_detr", "layers", "csrc")
NVCC = shutil.which("nvcc")
NO_COMPILER = {"CXX": "/nowhere/c++"}
VARIABLES = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "DN_DETR_EXTENSION", "FORCE_CUDA")

# As pip's environment for builds: this interpreter with setuptools, but none of its other packages.
ISOLATED = """
import site, sys
from pathlib import Path
sys.path = [p for p in sys.path if not Path(p, "torch").exists()] + ["build_tools"]
"""
WITHOUT_TORCH = ISOLATED + "site.getsitepackages = site.getusersitepackages = lambda: []\n"
BUILD = "from setuptools import build_meta; print('built', build_meta.build_{}('.'))"

KERNELS = """
from dn_detr.layers.deformable.extension import MISSING, has_kernel
print([MISSING, has_kernel("cpu"), has_kernel("cuda")])
"""


def copy_project(folder: Path) -> Path:
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    leave_behind = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "dn_detr", folder / "dn_detr", ignore=leave_behind)
    (folder / "build_tools").mkdir()
    packages = Path(importlib.util.find_spec("setuptools").origin).parent.parent
    for path in (*packages.glob("setuptools*"), packages / "_distutils_hack"):
        (folder / "build_tools" / path.name).symlink_to(path)
    return folder


def run(folder: Path, program: str, **environ: str) -> subprocess.CompletedProcess:
    """Runs Python in `folder`; stderr is part of stdout."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**env, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def built_file(done: subprocess.CompletedProcess, folder: Path) -> Path:
    assert done.returncode == 0, done.stdout[-3000:]
    return folder / done.stdout.split("built ")[-1].strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to try builds in that come to nothing."""
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dn_detr_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel with all kernels that can be compiled here, torch being hidden.

    One build for all tests of its result: it takes a minute.
    """
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    folder = copy_project(tmp_path_factory.mktemp("full"))
    cuda = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"} if can_compile_cuda() else {}
    done = run(folder, ISOLATED + BUILD.format("wheel"), DN_DETR_EXTENSION="1", **cuda)
    wheel = built_file(done, folder)
    target = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def can_compile_cuda() -> bool:
    return NVCC is not None and torch.version.cuda is not None


def test_the_kernels_are_installed_and_register_themselves(installed: Path) -> None:
    """The torch that the build environment hid is the one they fit."""
    (library,) = (installed / "dn_detr").glob("_C*.so")
    done = run(installed, KERNELS)
    assert done.stdout.splitlines()[-1] == str(["", True, can_compile_cuda()]), done.stdout
    assert not list(installed.rglob("csrc"))


def test_the_cuda_kernels_register_themselves(installed: Path) -> None:
    """Compiled for a GPU that need not be here."""
    if not can_compile_cuda():
        pytest.skip("there is no nvcc, or torch is one without CUDA")
    names = ("multi_scale_deformable_attention", "multi_scale_deformable_attention_backward")
    dumps = "\n".join(f"print(torch._C._dispatch_dump('dn_detr::{name}'))" for name in names)
    done = run(installed, f"import torch\n{KERNELS}{dumps}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("CUDA: ")]
    assert len(lines) == 2 and all("cuda/register.cpp" in line for line in lines), done.stdout


def test_openmp_is_that_of_torch(installed: Path) -> None:
    """With a second runtime, torch.set_num_threads would not count."""
    (library,) = (installed / "dn_detr").glob("_C*.so")
    content = library.read_bytes()
    if b"GOMP_parallel" not in content:
        pytest.skip("built without OpenMP")
    assert b"libgomp" not in content and b"libomp" not in content


def test_without_a_compiler(project: Path) -> None:
    """The package is installed all the same, without kernels, and says so."""
    done = run(project, BUILD.format("wheel"), **NO_COMPILER)
    wheel = zipfile.ZipFile(built_file(done, project))
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    assert "dn_detr/layers/boxes.py" in wheel.namelist()
    assert (
        "dn_detr: no kernels were built: there is no C++ compiler (/nowhere/c++). Install g++, or "
        "set CXX\n" in done.stdout
    )
    assert "plain PyTorch" in done.stdout and "pip install --no-build-isolation" in done.stdout


@pytest.mark.parametrize("asked_for", ["DN_DETR_EXTENSION", "FORCE_CUDA"])
def test_without_a_compiler_where_kernels_are_asked_for(project: Path, asked_for: str) -> None:
    cuda_home = {"CUDA_HOME": "/nowhere"} if asked_for == "FORCE_CUDA" else {}
    done = run(project, BUILD.format("wheel"), **{asked_for: "1"}, **cuda_home, **NO_COMPILER)
    assert done.returncode != 0
    assert "dn_detr: no kernels were built: " in done.stdout


def test_without_torch(project: Path) -> None:
    done = run(project, WITHOUT_TORCH + BUILD.format("wheel"))
    built_file(done, project)
    assert "dn_detr: no kernels were built: torch does not import (No module named" in done.stdout
    assert "with --no-build-isolation" in done.stdout


@pytest.mark.parametrize("ninja", [True, False])
def test_sources_that_do_not_compile(tmp_path: Path, ninja: bool) -> None:
    """The compiler's message is told, and a library of an earlier build is not left."""
    if shutil.which("c++") is None or (ninja and shutil.which("ninja") is None):
        pytest.skip("there is no C++ compiler, or no ninja")
    folder = copy_project(tmp_path)
    for name in ("cpu", "cuda", "arguments.cpp"):
        path = folder / CSRC / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / CSRC / "module.cpp").write_text("this is not C++;\n")
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    stale = folder / "dn_detr" / f"_C{suffix}"
    stale.touch()
    program = "import sys; sys.argv[1:] = ['build_ext', '--inplace']; exec(open('setup.py').read())"
    if not ninja:
        program = "import torch.utils.cpp_extension as c; c.is_ninja_available = bool\n" + program
    done = run(folder, program)
    assert done.returncode == 0, done.stdout
    assert "dn_detr: no kernels were built: " in done.stdout
    told = done.stdout.split("dn_detr: no kernels were built: ")[1].splitlines()
    assert any("module.cpp:1:1: error: " in line for line in told[:6]), told
    assert not stale.exists()


def test_sources_are_distributed(project: Path) -> None:
    done = run(project, BUILD.format("sdist"), DN_DETR_EXTENSION="0")
    names = tarfile.open(built_file(done, project)).getnames()
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    sources = [path for path in (ROOT / CSRC).rglob("*") if path.is_file()]
    assert len(sources) > 4
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= inside


def test_every_source_is_compiled(setup_script: ModuleType, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    everything = {path.relative_to(ROOT).as_posix() for path in CSRC_FILES}
    cpu, cuda = setup_script.sources(cuda=False), setup_script.sources(cuda=True)
    assert set(cuda) | set(setup_script.headers()) == everything
    assert set(cpu) == {name for name in cuda if "/cuda/" not in name}


CSRC_FILES = [p for p in (ROOT / CSRC).rglob("*") if p.is_file() and p.suffix != ".md"]


def fake_nvcc(folder: Path, top: Path) -> None:
    (folder / "nvcc").write_text(f"#!/bin/sh\necho '#$ _HERE_=x\n#$ TOP={top}/bin/..' >&2\n")
    (folder / "nvcc").chmod(0o755)


def test_the_toolkit_behind_a_wrapper_is_found(
    setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit, bin_folder = tmp_path / "cuda-13.0", tmp_path / "bin"
    for folder in (toolkit / "bin", bin_folder):
        folder.mkdir(parents=True)
    fake_nvcc(bin_folder, toolkit)
    monkeypatch.setenv("PATH", f"{bin_folder}:/bin:/usr/bin")
    assert setup_script.find_cuda_home() == str(toolkit)
    (bin_folder / "nvcc").unlink()
    monkeypatch.setenv("PATH", str(bin_folder))
    assert setup_script.find_cuda_home() == ""


def torch_like(cuda: str | None, gpu: bool) -> SimpleNamespace:
    return SimpleNamespace(
        __version__="2.4.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: gpu),
        _C=SimpleNamespace(
            _cuda_getArchFlags=lambda: "sm_50 sm_75 sm_120 sm_90 sm_90a compute_120"
        ),
    )


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    for name in (*VARIABLES, "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the script sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path


def test_cuda_only_where_there_is_a_gpu(setup_script: ModuleType, toolkit: Path) -> None:
    assert not setup_script.prepare_cuda(torch_like("13.0", gpu=False))
    assert not setup_script.prepare_cuda(torch_like(None, gpu=True))  # ROCm's torch
    assert setup_script.prepare_cuda(torch_like("13.0", gpu=True))
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ  # torch asks the GPU


def test_cuda_without_a_gpu(
    setup_script: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For torch's own architectures, the newest also as PTX, unless some are named."""
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert setup_script.prepare_cuda(torch_like("13.0", gpu=False))
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;9.0;12.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert setup_script.prepare_cuda(torch_like("13.0", gpu=False))
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0"


def test_cuda_without_a_toolkit(
    setup_script: ModuleType,
    toolkit: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (toolkit / "bin" / "nvcc").unlink()
    assert not setup_script.prepare_cuda(torch_like("13.0", gpu=True))
    assert f"without CUDA kernels: there is no CUDA toolkit in {toolkit}" in capsys.readouterr().err
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(setup_script.BuildError, match="FORCE_CUDA is set, but .* Set CUDA_HOME to"):
        setup_script.prepare_cuda(torch_like("13.0", gpu=True))
    with pytest.raises(setup_script.BuildError, match=r"\(2.4.0\) is one without CUDA"):
        setup_script.prepare_cuda(torch_like(None, gpu=False))


def test_nothing_is_compiled_where_nothing_is_wanted(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, wanted in (("", True), ("1", True), ("0", False)):
        monkeypatch.setenv("DN_DETR_EXTENSION", value)
        assert setup_script.is_wanted() is wanted
    monkeypatch.setenv("DN_DETR_EXTENSION", "yes")
    with pytest.raises(SystemExit, match="DN_DETR_EXTENSION: 0 or 1"):
        setup_script.is_wanted()
