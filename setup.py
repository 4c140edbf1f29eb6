"""Builds the package, and with it the compiled kernels, `dn_detr._C` (dn_detr/layers/csrc).

Everything else about the project stands in pyproject.toml. The kernels for the CPU are built
always; those for CUDA where torch sees a GPU and there is a CUDA toolkit. What cannot be built is
left out, and said: the operations then run in plain PyTorch. Environment variables:

    FORCE_CUDA=1            CUDA kernels on a machine without a GPU too, or the build fails
    TORCH_CUDA_ARCH_LIST    GPU architectures, such as "8.0;9.0+PTX"; otherwise those of the GPUs
                            here, and without any, those that torch was built for
    CUDA_HOME, CXX          another CUDA toolkit, another compiler
    MAX_JOBS                how many compilers at a time
    DN_DETR_EXTENSION       0: build no kernels; 1: fail where they cannot be built
"""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import threading
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

NAME = "dn_detr._C"
CSRC = Path("dn_detr/layers/csrc")
AGAIN = "pip install --no-build-isolation -v -e ."


class BuildError(Exception):
    """The kernels, or a part of them, cannot be built; the message says why, and what to do."""


def say(message: str) -> None:
    print(f"dn_detr: {message}", file=sys.stderr, flush=True)


def is_on(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def is_wanted() -> bool:
    if os.environ.get("DN_DETR_EXTENSION", "") not in ("", "0", "1"):
        raise SystemExit("DN_DETR_EXTENSION: 0 or 1 is needed, or nothing")
    return os.environ.get("DN_DETR_EXTENSION") != "0"


def sources(cuda: bool) -> list:
    """The files to compile, relative to this one."""
    files = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".cu"))
    return [path.as_posix() for path in files if cuda or CSRC / "cuda" not in path.parents]


def headers() -> list:
    included = (".h", ".cuh", ".inc")
    return [path.as_posix() for path in sorted(CSRC.rglob("*")) if path.suffix in included]


def import_torch():
    """The torch that will load the extension.

    pip builds in an environment of its own, which hides the torch that is installed, and any other
    torch would do harm: an extension fits the one that it was built with. But pip's environment has
    the same interpreter, which knows where its packages are.
    """
    if importlib.util.find_spec("torch") is None:
        folders = site.getsitepackages()
        if sys.prefix == sys.base_prefix:
            folders.append(site.getusersitepackages())
        for folder in folders:
            site.addsitedir(folder)
    try:
        import torch
    except (ImportError, OSError) as error:
        raise BuildError(
            f"torch does not import ({error}). Install torch first; if it is installed, build "
            "where it can be seen, with --no-build-isolation"
        ) from error
    return torch


def find_cuda_home() -> str:
    """Folder of the CUDA toolkit whose nvcc is on PATH; "" if there is none.

    torch takes the folder above nvcc's, which is wrong where that nvcc is a script that calls one
    elsewhere.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return ""
    dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(dry_run, capture_output=True, text=True).stderr
    tops = [line.split("TOP=")[1] for line in said.splitlines() if line.startswith("#$ TOP=")]
    return os.path.realpath(tops[0]) if tops else ""


def prepare_cuda(torch) -> bool:
    """Whether to build for CUDA; sets the environment variables that torch's build reads.

    Raises:
        BuildError: FORCE_CUDA is set, and there is no toolkit, or torch is one without CUDA.
    """
    forced = is_on("FORCE_CUDA")
    problem = ""
    if not (forced or (torch.version.cuda and torch.cuda.is_available())):
        return False
    if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        os.environ["CUDA_HOME"] = find_cuda_home() or "/usr/local/cuda"
    home = os.environ.get("CUDA_HOME") or os.environ["CUDA_PATH"]
    if not torch.version.cuda:
        problem = f"the torch that is installed ({torch.__version__}) is one without CUDA"
    elif not (Path(home) / "bin" / "nvcc").exists():
        problem = (
            f"there is no CUDA toolkit in {home} (bin/nvcc). Set CUDA_HOME to the folder of CUDA "
            f"{torch.version.cuda}"
        )
    if problem and forced:
        raise BuildError(f"FORCE_CUDA is set, but {problem}")
    if problem:
        say(f"building without CUDA kernels: {problem}")
    elif not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(torch))
    return not problem


def architectures(torch) -> str:
    """Those that torch was built for, from the first with atomics of float64 (6.0) on.

    Without a GPU, torch's build finds none by itself.
    """
    flags = torch._C._cuda_getArchFlags().split()
    numbers = sorted(int(flag[3:]) for flag in flags if re.fullmatch(r"sm_\d+", flag))
    named = [f"{number // 10}.{number % 10}" for number in numbers if number >= 60]
    return ";".join(named or ["8.0"]) + "+PTX"


def compiler_flags(torch) -> dict:
    """Of C++ and of CUDA; the C++ standard is left to torch, which knows what its headers need.

    Raises:
        BuildError: there is no C++ compiler.
    """
    # Not before prepare_cuda: it reads the variables that are set there when it is imported.
    from torch.utils import cpp_extension

    # A virtual environment's ninja is to be found where that is not activated, too.
    os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable)
    flags = ["-O3", "-g0"]  # Python's own flags have -g, which makes the library ten times as large
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    if not compiler or shutil.which(compiler[0]) is None:
        named = compiler[0] if compiler else "CXX is empty"
        raise BuildError(f"there is no C++ compiler ({named}). Install g++, or set CXX")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    # Compiled with OpenMP, but not linked with it: the names are to be found in the runtime that
    # torch has loaded. With a second runtime, torch.set_num_threads would not count here. Clang
    # calls functions that GCC's runtime, the one in torch's packages, does not have.
    if torch.backends.openmp.is_available() and "clang" not in version:
        flags.append("-fopenmp")
    else:
        say("built with this compiler, the CPU kernels run on one thread; g++ makes threaded ones")
    return {"cxx": flags, "nvcc": ["-O3"]}


@contextlib.contextmanager
def last_lines(lines: list):
    """Leaves in `lines` the end of what this process and its children print; prints it all."""
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    saved = {fd: os.dup(fd) for fd in (1, 2)}

    def copy() -> None:
        with os.fdopen(read, errors="replace") as stream:
            for line in stream:
                os.write(saved[1], line.encode())
                lines.append(line.rstrip())
                del lines[:-200]

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    for fd in saved:
        os.dup2(write, fd)
    os.close(write)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, original in saved.items():
            os.dup2(original, fd)
        thread.join(timeout=5)  # a compiler cache's server that was started here has no end


def telling(lines: list) -> str:
    """The last few lines that speak of an error, or simply the last few."""
    errors = [line for line in lines if re.search(r"(?<![-\w])error\b|not found", line, re.I)]
    return "\n".join(f"    {line[:200]}" for line in (errors or lines)[-5:])


def tell_loss(lost: str, reason: str) -> None:
    """Says that the build goes on, and without what.

    Raises:
        SystemExit: it was asked for.
    """
    message = f"{lost}: {reason}"
    if is_on("DN_DETR_EXTENSION") or is_on("FORCE_CUDA"):
        raise SystemExit(f"dn_detr: {message}")
    say(
        f"{message}\n  Multi-scale deformable attention will run in plain PyTorch there, many "
        f"times slower.\n  To build it later: {AGAIN} (or without -e)"
    )


class BuildKernels(build_ext):
    """Has torch's command build the extension; imports torch only if it comes to that."""

    def run(self) -> None:
        if not self.extensions:
            return
        try:
            torch = import_torch()
            cuda = prepare_cuda(torch)
            flags = compiler_flags(torch)
        except BuildError as error:
            return self.give_up(str(error))
        except Exception as error:  # whatever torch or a compiler thinks of this machine
            return self.give_up(f"{type(error).__name__}: {error}")
        for with_cuda in (True, False) if cuda else (False,):
            printed = []
            try:
                with last_lines(printed):
                    return self.build(with_cuda, flags)
            except Exception as error:  # compilers fail in many ways; all of them are told
                reason = f"{' '.join(str(error).split())}\n{telling(printed)}"
                if with_cuda:
                    tell_loss("no CUDA kernels were built", reason)
                else:
                    self.give_up(reason)

    def build(self, cuda: bool, flags: dict) -> None:
        from torch.utils import cpp_extension

        make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
        extension = make(NAME, sources(cuda), depends=headers(), extra_compile_args=flags)
        self.distribution.ext_modules = [extension]
        command = cpp_extension.BuildExtension(self.distribution)
        command.ensure_finalized()
        for option in ("build_lib", "build_temp", "debug", "inplace", "editable_mode", "parallel"):
            setattr(command, option, getattr(self, option))
        command.run()

    def give_up(self, reason: str) -> None:
        """Goes on without kernels; those of an earlier build in this place may not fit and go."""
        tell_loss("no kernels were built", reason)
        in_tree = self.inplace or self.editable_mode
        folder = Path() if in_tree else Path(self.build_lib)
        (folder / self.get_ext_filename(NAME)).unlink(missing_ok=True)
        self.extensions = []


if __name__ == "__main__":
    setup(
        # `tools`, `tests` and `projects` are left out on purpose: detectron2 already installs a
        # package that is called `tools`.
        packages=find_packages(include=["dn_detr", "dn_detr.*"]),
        ext_modules=[Extension(NAME, [])] if is_wanted() else [],  # BuildKernels knows the sources
        cmdclass={"build_ext": BuildKernels},
    )
