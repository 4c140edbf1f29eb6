"""What must hold of the CPU kernels' sources beyond this machine and its compiler."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from dn_detr.layers import deformable

SOURCES = sorted((Path(deformable.__file__).parent.parent / "csrc" / "cpu").glob("kernels_*.cpp"))

x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")


def test_there_are_three():
    names = [path.stem for path in SOURCES]
    assert names == ["kernels_avx2", "kernels_avx512", "kernels_generic"]


@pytest.mark.skipif(not shutil.which("clang++"), reason="there is no clang++")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_clang_takes_them(source, standard):
    command = ["clang++", f"-std={standard}", "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@x86_64
@pytest.mark.skipif(not shutil.which("nm"), reason="there is no nm")
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_code_for_one_instruction_set_is_not_shared(source, tmp_path):
    """A function that several files may define would be linked once, for any of the sets."""
    compiled = tmp_path / "kernels.o"
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-w", "-c", str(source), "-o", str(compiled)]
    subprocess.run(command, check=True)
    listed = subprocess.run(["nm", "-C", str(compiled)], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=2)[-2:] for line in listed.stdout.splitlines()]
    defined = {name for kind, name in symbols if kind in {"T", "W", "V", "u"}}
    assert {name for name in defined if not name.startswith("DW.ref")} == {
        f"dn_detr::cpu::{source.stem.removeprefix('kernels_')}::kernels()"
    }
