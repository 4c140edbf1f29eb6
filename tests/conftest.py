"""What every test run shares: how many threads, and which tests cannot run here.

Tests that need detectron2 have no convention to follow if importing is what they need it for: where
detectron2 is missing, a module (or a test) that stops with the ImportError of a missing detectron2,
or skips by `pytest.importorskip("detectron2")`, counts as not run, with its number of tests. A test
that needs it in another way, such as by starting a script of tools/, carries
`@pytest.mark.needs_detectron2` (or the module `pytestmark = ...`). The run ends with the number of
tests not run; with STRICT=1 it then fails.

`@pytest.mark.gpu`: not run where there is no GPU. `@pytest.mark.large`: only with --large.
"""

from __future__ import annotations

import ast
import logging
import os
import re
from pathlib import Path

# Before torch is imported, and for the processes that tests start.
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(_CPUS // _PROCESSES, 8))))

import pytest  # noqa: E402
import torch  # noqa: E402

from dn_detr.requirements import DETECTRON2_INSTALL_COMMAND, require_detectron2  # noqa: E402

_STRICT = os.environ.get("STRICT", "") not in ("", "0")
_NOT_RUN = re.compile(r"not run, detectron2 is missing: (\d+)")
_SIGNS = (
    "needs detectron2, which does not import",  # dn_detr.requirements
    "No module named 'detectron2",  # a plain import
    "import of detectron2 halted",  # a blocked one
    "could not import 'detectron2",  # pytest.importorskip
)


def _missing_reason() -> str:
    try:
        require_detectron2()
    except ImportError as error:
        return str(error).splitlines()[0]
    return ""


_MISSING = _missing_reason()


@pytest.fixture
def fresh_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's logger as before any set-up, which has it hand nothing on to caplog.

    pytest 9 adds itself to such a logger, and would note twice what is handed on as well.
    """
    monkeypatch.setattr(logging.getLogger("dn_detr"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("dn_detr"), "handlers", [])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="also run the tests marked large")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = []
    if _MISSING:
        skips.append(("needs_detectron2", "not run, detectron2 is missing: 1 test"))
    if not torch.cuda.is_available():
        skips.append(("gpu", "there is no GPU"))
    if not config.getoption("--large"):
        skips.append(("large", "large: run with --large"))
    for item in items:
        for marker, reason in skips:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _count_tests(path: Path) -> int:
    """The number of test functions of a file that cannot be imported (parametrised ones once)."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return sum(isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in nodes)


def _as_not_run(report: pytest.CollectReport | pytest.TestReport, path: Path, tests: int) -> None:
    """Makes what a missing detectron2 stopped a skip that tells the number of tests."""
    if _MISSING and not report.passed and any(sign in str(report.longrepr) for sign in _SIGNS):
        report.outcome = "skipped"
        report.longrepr = (str(path), 0, f"Skipped: not run, detectron2 is missing: {tests} tests")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    if isinstance(collector, pytest.Module):
        _as_not_run(report, collector.path, _count_tests(collector.path))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    _as_not_run(report, item.path, 1)
    return report


def _number_not_run(config: pytest.Config) -> int:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    found = [_NOT_RUN.search(str(report.longrepr)) for report in skipped]
    return sum(int(match[1]) for match in found if match)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _STRICT and exitstatus == 0 and _number_not_run(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    number = _number_not_run(config)
    if number:
        terminalreporter.section("not run", red=_STRICT, yellow=not _STRICT)
        terminalreporter.line(f"{number} tests not run: detectron2 is missing.")
        terminalreporter.line(_MISSING)
        terminalreporter.line(
            f"Remedy: DETECTRON2=<folder, wheel or address> make test, or\n"
            f"    {DETECTRON2_INSTALL_COMMAND}"
        )
        if _STRICT:
            terminalreporter.line("STRICT=1: this counts as a failure.")
