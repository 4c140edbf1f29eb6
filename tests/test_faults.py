"""Every row of RELIABILITY.md has a test, and every fault that is tested has its row."""

import contextlib
import io
import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

ROOT = Path(__file__).resolve().parent.parent
ROWS = list(range(1, 67))


class Collector:
    """What pytest would run, by the rows of `pytest.mark.fault`."""

    def __init__(self) -> None:
        self.tests: dict[int, set[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("fault"):
                (row,) = mark.args
                self.tests.setdefault(row, set()).add(item.nodeid)


@pytest.fixture(scope="module")
def tests_of_rows() -> dict[int, set[str]]:
    """Row -> tests marked with it. Collected, since marks of parameters can be made by code."""
    collector = Collector()
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main([*options, str(ROOT / "tests")], plugins=[collector])
    assert status == pytest.ExitCode.OK, output.getvalue()[-2000:]
    return collector.tests


def table() -> list[list[str]]:
    """The cells of the table's rows: number, fault, promise."""
    lines = (ROOT / "RELIABILITY.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if re.match(r"\|\s*\d+\s*\|", line)]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_every_fault_has_a_test(tests_of_rows) -> None:
    assert sorted(tests_of_rows) == ROWS


def test_the_table_has_every_fault_once_and_a_promise_for_each() -> None:
    rows = table()
    assert [int(row[0]) for row in rows] == ROWS
    assert all(len(row) == 3 and all(row) for row in rows)
