"""Makes the .venv that `make demo` and `make test` run in, and installs nothing twice.

    python3 scripts/setup_env.py

1. A .venv, unless there is one. If the interpreter that runs this script has a detectron2 that
   imports, the .venv uses that environment's packages and its torch.
2. The pinned torch and torchvision (requirements.txt), then this project, editable.
3. This project's compiled kernels. Where that fails, a message says why, once.
4. detectron2, the first that can be had: one that imports already; what DETECTRON2 names (a
   folder, a wheel, an address); the upstream repository at the pinned commit.

Each of the last three is written down when it is done, with a hash of the files that decide it: a
set-up that failed or was stopped is taken up again, a complete one is recognised at once, and a
changed kernel is all that is built again. Without detectron2 the set-up still succeeds and says
what is missing; with STRICT=1 it fails.

Standard library only: nothing is installed yet when this runs.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import List, Mapping, Tuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "dn_detr-setup.txt"
OLDEST, NEWEST = (3, 10), (3, 13)
DECIDED_BY = ("requirements.txt", "pyproject.toml", "setup.py")
KERNELS = Path("dn_detr", "layers", "csrc")
BUILD_TOOLS = ("setuptools>=77", "wheel", "ninja")

# What the rest of the set-up relies on; the file says why an import is the test.
PROBE = "from dn_detr.requirements import require_detectron2; require_detectron2()"


class SetupError(Exception):
    """The set-up cannot go on; the message says why, and what to do."""


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def check_python(version: Tuple[int, int]) -> None:
    """Raises SetupError unless `version` (major, minor) is one that is supported."""
    if not OLDEST <= tuple(version) <= NEWEST:
        raise SetupError(
            "Python {}.{} to {}.{} is needed, this is {}.{}. Name another interpreter:\n"
            "    make PYTHON=python3.12 ...".format(*OLDEST, *NEWEST, *version)
        )


def stamp_lines(root: Path) -> List[str]:
    """What the stamp of a complete set-up holds: hashes of what decides it, and detectron2."""
    kernels = [path for path in sorted((root / KERNELS).rglob("*.*")) if path.suffix != ".md"]
    decided_by = [root / name for name in DECIDED_BY]
    return [_hash(root, decided_by), _hash(root, kernels), "detectron2"]


def _hash(root: Path, files: List[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(
            path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()


def steps_done(stamp: Path, root: Path) -> int:
    """How many steps are done: 1 torch and the project, 2 the kernels too, 3 detectron2 too."""
    found = stamp.read_text().split() if stamp.is_file() else []
    expected = stamp_lines(root)
    return next(n for n in (3, 2, 1, 0) if found[:n] == expected[:n])


def pip_source(named: str) -> str:
    """What pip takes for the value of DETECTRON2: a folder, a wheel, or an address.

    Raises:
        SetupError: it looks like a path, and there is nothing there.
    """
    if "://" in named:
        is_plain_git = re.search(r"\.git(@.+)?$", named) and not named.startswith("git+")
        return "git+" + named if is_plain_git else named
    path = Path(named).expanduser()
    if not path.exists():
        raise SetupError(f"DETECTRON2={named}: there is no such folder or file")
    return str(path.resolve())


def detectron2_sources(environ: Mapping[str, str], upstream: str) -> List[str]:
    """Where detectron2 may come from, in the order in which to try."""
    named = environ.get("DETECTRON2", "").strip()
    return ([named] if named else []) + [upstream]


def _run(command: List[str], **options) -> bool:
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, **options)
    return done.returncode == 0


def _pip(*arguments: str, **options) -> bool:
    quiet = [] if sys.stdout.isatty() else ["--quiet"]  # pip's progress is for a person
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    return _run([*command, *quiet, *arguments], **options)


def _pip_for_detectron2(source: str) -> str:
    """Installs it; returns the line of pip's errors that tells the reason, or "" for success."""
    jobs = os.environ.get("MAX_JOBS", str(min(os.cpu_count() or 1, 8)))
    env = dict(os.environ, MAX_JOBS=jobs, GIT_TERMINAL_PROMPT="0")
    log = VENV / "detectron2-install.log"
    with log.open("w") as errors:
        # No isolation: its build imports torch, and is to fit the one that is installed.
        if _pip("--no-build-isolation", source, env=env, stderr=errors):
            return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    telling = [line for sign in ("fatal:", "Error: ", "error: ") for line in lines if sign in line]
    return f"{telling[0] if telling else 'pip failed'} (all of it: .venv/{log.name})"


def _why_not(python: str) -> str:
    """Why detectron2 does not import with `python`; empty where it does."""
    probe = subprocess.run(
        [python, "-W", "ignore", "-c", PROBE], cwd=ROOT, capture_output=True, text=True
    )
    lines = [line for line in probe.stderr.splitlines() if "does not import: " in line]
    if probe.returncode == 0:
        return ""
    return lines[-1].split("does not import: ")[1] if lines else probe.stderr.strip()[-300:]


def make_venv() -> None:
    """Makes the .venv, or mends one whose making was interrupted."""
    if PYTHON.exists() and _run([str(PYTHON), "-c", "import pip"]):
        return
    say(f"making .venv with Python {platform.python_version()} ({sys.executable})")
    if not _run([sys.executable, "-m", "venv", str(VENV)]):
        raise SetupError(
            "a virtual environment could not be made (on Debian and Ubuntu: "
            "apt install python3-venv)"
        )
    if _why_not(sys.executable) == "":
        share_packages_of_this_python()


def share_packages_of_this_python() -> None:
    """Lets the .venv see the packages of the interpreter that runs this script.

    `--system-site-packages` would do this too, but not for an interpreter that is itself one of a
    virtual environment.
    """
    import site
    import sysconfig

    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if site.ENABLE_USER_SITE:
        folders.add(site.getusersitepackages())
    lines = [f"import site; site.addsitedir({folder!r})" for folder in sorted(folders)]
    command = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inside = subprocess.check_output([str(PYTHON), "-c", command], text=True).strip()
    (Path(inside) / "packages_of_the_base.pth").write_text("\n".join(lines) + "\n")
    say(f"detectron2 imports with {sys.executable}: its packages and its torch are used")


def install_project() -> None:
    """Installs the build tools, torch, and this project with what it needs."""
    # No isolation: an extension must be built against the torch that is installed here.
    project = ["--no-build-isolation", "-e", ".[draw,test]"]
    if _base_is_shared():
        say("installing this project")
        steps = [list(BUILD_TOOLS), project]
    else:
        say("installing torch (large: some minutes the first time), then this project")
        pins = "requirements.txt"
        steps = [list(BUILD_TOOLS), ["-r", pins], [*project, "-c", pins]]
    env = dict(os.environ, DN_DETR_EXTENSION="0")  # build_kernels comes next
    for step in steps:
        if not _pip(*step, env=env):
            raise SetupError(
                "pip could not install " + " ".join(step) + " (its message is above). "
                "What is installed already is kept: run the same command again."
            )


def build_kernels() -> None:
    """Builds dn_detr._C where it is imported from; says what of it is lost, and why."""
    say("building this project's kernels (a minute or two)")
    lost = _lost_kernels()
    if lost:
        say(lost)


def _lost_kernels() -> str:
    """Builds them; returns setup.py's messages about what it left out, "" for nothing."""
    log = VENV / "kernels-build.log"
    with log.open("w") as output:
        command = [str(PYTHON), "setup.py", "build_ext", "--inplace"]
        succeeded = _run(command, stdout=output, stderr=subprocess.STDOUT)
    text = log.read_text(errors="replace")
    messages = re.findall(r"^dn_detr: (.*\n(?: +.*\n)*)", text, re.MULTILINE)
    if not succeeded and not messages:
        messages = ["no kernels were built: setup.py failed\n"]
    return "".join(messages) + f"  (all of it: .venv/{log.name})" if messages else ""


def _base_is_shared() -> bool:
    return any(VENV.glob("lib/python*/site-packages/packages_of_the_base.pth"))


def install_detectron2(sources: List[str]) -> bool:
    """Installs the first of `sources` that can be had; returns whether detectron2 imports."""
    for source in sources:
        say(f"installing detectron2 from {source} (its build takes 5 to 10 minutes on two cores)")
        try:
            problem = _pip_for_detectron2(pip_source(source)) or _why_not(str(PYTHON))
        except SetupError as error:
            problem = str(error)
        if not problem:
            return True
        say(f"detectron2 could not be had from {source}: {problem}")
    return False


def report_missing(reason: str, command: str, strict: bool) -> None:
    """Says in one message that detectron2 is missing and what helps.

    Raises:
        SetupError: `strict`, with the same message.
    """
    message = (
        f"detectron2 is missing: {reason}\n"
        "  Name a folder, a wheel or an address that it can be had from:\n"
        "      make DETECTRON2=... demo\n"
        "  or install it into the environment yourself, and run make again:\n"
        f"      . .venv/bin/activate && {command}"
    )
    if strict:
        raise SetupError(message + "\n  (STRICT=1: not going on without it)")
    say(message + "\n  Going on with what works without it.")


def set_up(environ: Mapping[str, str]) -> None:
    """Does what is missing of the steps that the module describes.

    Raises:
        SetupError: a step failed, or detectron2 is missing and STRICT is set.
    """
    check_python(sys.version_info[:2])
    sys.path.insert(0, str(ROOT))
    from dn_detr.requirements import DETECTRON2_INSTALL_COMMAND, DETECTRON2_SOURCE

    done = steps_done(STAMP, ROOT) if PYTHON.exists() else 0
    if done == 3 and _has_package("detectron2"):
        return
    lines = stamp_lines(ROOT)
    if done == 0:
        make_venv()
        install_project()
        STAMP.write_text(lines[0] + "\n")
    if done < 2:
        build_kernels()
        STAMP.write_text("\n".join(lines[:2]) + "\n")
    if _why_not(str(PYTHON)) and not install_detectron2(
        detectron2_sources(environ, DETECTRON2_SOURCE)
    ):
        strict = environ.get("STRICT", "") not in ("", "0")
        report_missing(_why_not(str(PYTHON)), DETECTRON2_INSTALL_COMMAND, strict)
        return
    STAMP.write_text("\n".join(lines) + "\n")
    say("ready")


def _has_package(name: str) -> bool:
    """Whether the .venv has a package of that name; fast, for it imports nothing."""
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is None)"
    return _run([str(PYTHON), "-c", code])


def main() -> int:
    try:
        set_up(os.environ)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
