"""Curves from metrics.json; needs no detectron2."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dn_detr.evaluation.plots import MATCHED, plot_curves, read_metrics, series

ROOT = Path(__file__).parents[2]


def write(path: Path, *entries: dict) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def entry(iteration: int, loss: float, **more: float) -> dict:
    return {"iteration": iteration, **dict.fromkeys(MATCHED, loss), **more}


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    last = {"dn_loss_ce": 1.0, "dn_loss_bbox": 1.0, "dn_loss_giou": 1.0, "bbox/AP": 30.0}
    return write(tmp_path / "metrics.json", entry(19, 2.0), entry(39, 1.0, **last))


def test_series_adds_what_belongs_together(metrics: Path) -> None:
    read = read_metrics(metrics)
    assert series(read, MATCHED) == ([19, 39], [6.0, 3.0])
    assert series(read, ("bbox/AP",)) == ([39], [30.0])
    assert series(read, ("bbox_ema/AP",)) == ([], [])


def test_a_resumed_training_counts_as_last_written(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", entry(1, 3.0), entry(2, 9.0), entry(2, 1.0), entry(3, 1.0))
    assert series(read_metrics(path), MATCHED) == ([1, 2, 3], [9.0, 3.0, 3.0])


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", {"iteration": 1, "bbox/APl": float("nan"), "bbox/AP": 1.0})
    assert read_metrics(path) == {1: {"bbox/AP": 1.0}}


def test_a_line_that_was_cut_off_is_forgiven_at_the_end_only(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", entry(1, 1.0))
    path.write_text(path.read_text() + '{"iteration": 2, "lo')
    assert list(read_metrics(path)) == [1]
    path.write_text(path.read_text() + "\n" + json.dumps(entry(3, 1.0)))
    with pytest.raises(ValueError, match="m.json, line 2,"):
        read_metrics(path)


@pytest.mark.parametrize("content", [None, ""])
def test_nothing_to_draw_is_said(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "m.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="m.json"):
        plot_curves({"run": path}, tmp_path / "curves.png")


def test_two_runs_stand_in_one_picture(metrics: Path, tmp_path: Path) -> None:
    plot_curves({"a": metrics}, tmp_path / "one.png")
    other = write(tmp_path / "other.json", entry(19, 4.0, **{"bbox/AP": 10.0}), entry(39, 3.0))
    plot_curves({"a": metrics, "b": other}, tmp_path / "deeper" / "two.png")
    one = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).astype(int)
    two = np.asarray(Image.open(tmp_path / "deeper" / "two.png").convert("RGB")).astype(int)
    orange = (255, 127, 14)  # matplotlib's second colour
    assert not (abs(one - orange).sum(-1) < 30).any()
    assert (abs(two - orange).sum(-1) < 30).sum() > 100


def test_the_tool_takes_files_folders_and_labels(metrics: Path, tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "plot_metrics.py")]
    options = [f"first run={metrics}", str(metrics.parent), "--output", "curves.png"]
    subprocess.run([*tool, *options], cwd=tmp_path, check=True, env=_environ())
    assert (tmp_path / "curves.png").is_file()
    options[1] = str(tmp_path / "nowhere")
    done = subprocess.run(
        [*tool, *options], cwd=tmp_path, env=_environ(), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no ") and "Traceback" not in done.stderr


def _environ() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
