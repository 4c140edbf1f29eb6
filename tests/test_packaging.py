"""What a user gets who installs the package: its metadata, and what imports without detectron2."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dn_detr.requirements import DETECTRON2_INSTALL_COMMAND

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("configs", "dn_detr", "projects", "scripts", "tests", "tools")
CODE = sorted(path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py"))
PLAIN = ("dn_detr.layers", "dn_detr.denoising", "dn_detr.modeling")
FOREIGN = ("detectron2", "fvcore", "iopath")

# Put in front of a program: imports of these packages fail as if they were not installed.
BLOCKER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def run_without(packages: tuple[str, ...], program: str) -> subprocess.CompletedProcess:
    code = BLOCKER.format(blocked=packages) + program
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, at its top or further down; relative ones excepted."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def modules_of(package: str) -> list[str]:
    files = (ROOT / package.replace(".", "/")).rglob("*.py")
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in sorted(files)]
    return [".".join(p for p in names if p != "__init__") for names in parts]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The built package, of a copy of the sources (a build leaves folders behind), uncompiled."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave_behind = shutil.ignore_patterns("__pycache__", "*.so")
    for name in CODE_FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=leave_behind)
    program = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=source,
        env=dict(os.environ, DN_DETR_EXTENSION="0"),
        capture_output=True,
        text=True,
        check=True,
    )
    return zipfile.ZipFile(source / done.stdout.split()[-1])


def test_metadata_can_be_published(wheel: zipfile.ZipFile) -> None:
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    header = wheel.read(metadata).decode().split("\n\n")[0]
    required = [line for line in header.splitlines() if line.startswith("Requires-Dist:")]
    assert any(line.startswith("Requires-Dist: torch>=2.4") for line in required)
    assert "License-Expression: Apache-2.0" in header
    # An index takes no addresses, and a bare "detectron2" would be somebody else's package.
    assert not [line for line in required if "git+" in line or " @ " in line]
    assert not [line for line in required if "detectron2" in line]


def test_only_the_library_is_installed(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"dn_detr"}
    assert "dn_detr/py.typed" in wheel.namelist()
    assert not [name for name in wheel.namelist() if "/csrc/" in name]


def test_every_folder_of_the_library_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "dn_detr").rglob("*.py")}
    assert not [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()]


def test_tools_is_not_a_package() -> None:
    assert not (ROOT / "tools" / "__init__.py").exists()


def test_nothing_imports_what_is_broken_or_ambiguous() -> None:
    """model_zoo needs pkg_resources, which is gone; `tools` may be detectron2's."""
    broken = ("detectron2.model_zoo", "detectron2.utils.testing", "pkg_resources", "tools.")
    found = {
        str(path.relative_to(ROOT)): [n for n in imported_names(path) if f"{n}.".startswith(broken)]
        for path in CODE
    }
    assert len(found) > 20
    assert not {path: names for path, names in found.items() if names}


def test_configs_hold_no_lambda() -> None:
    """A config with one cannot be loaded again once it is saved."""
    files = [path for path in CODE if "configs" in path.parts]
    assert files
    for path in files:
        lambdas = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Lambda)]
        assert not lambdas, f"{path.relative_to(ROOT)}:{lambdas[0].lineno}"


@pytest.mark.parametrize("package", PLAIN)
def test_plain_parts_name_only_plain_packages(package: str) -> None:
    files = sorted((ROOT / package.replace(".", "/")).rglob("*.py"))
    assert files
    for path in files:
        foreign = [name for name in imported_names(path) if name.split(".")[0] in FOREIGN]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_plain_parts_import_without_detectron2() -> None:
    """What they import in turn counts too."""
    modules = [module for package in PLAIN for module in modules_of(package)]
    program = "import importlib\n" + "\n".join(f"importlib.import_module({m!r})" for m in modules)
    done = run_without(FOREIGN, program)
    assert done.returncode == 0, done.stderr


def test_library_imports_without_detectron2() -> None:
    program = "import dn_detr; print(dn_detr.__version__, 'torch' in sys.modules)"
    done = run_without(FOREIGN, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "False"


@pytest.mark.parametrize("module", ["dn_detr.meta_arch.dn_detr", "dn_detr.engine.trainer"])
def test_the_rest_says_how_to_install_detectron2(module: str) -> None:
    done = run_without(("detectron2",), f"import {module}")
    assert done.returncode != 0
    assert "ImportError: This part of dn_detr needs detectron2" in done.stderr
    assert "No module named 'detectron2" in done.stderr
    assert DETECTRON2_INSTALL_COMMAND in done.stderr
