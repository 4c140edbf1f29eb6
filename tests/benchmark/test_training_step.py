"""The benchmark of training steps, on the smallest model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from dn_detr.benchmark.training_step import Row, Step, measure, table  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIG = "projects/dn_detr/configs/shapes_demo.py"
LITTLE = "model.decoder.num_layers=1"


def test_a_step_adds_the_gradients_of_one_batch():
    step = Step(str(ROOT / CONFIG), (LITTLE,), batch=2, height=64, width=96, objects=3)
    inputs = step.inputs()
    assert [x["image"].shape for x in inputs] == [(3, 64, 96)] * 2
    boxes = inputs[0]["instances"].gt_boxes.tensor
    assert len(boxes) == 3 and (boxes <= torch.tensor([96, 64, 96, 64])).all()
    model = step.model(torch.device("cpu"))
    assert len(model.decoder.layers) == 1 and model.num_classes == 80
    sum(model(inputs).values()).backward()
    assert sum(p.grad.abs().sum() > 0 for p in model.parameters()) > 20


def test_ratios_are_to_the_first_variant():
    rows = [Row("a", [2.0, 4.0, 3.0], 2**21), Row("b", [6.0], 2**20)]
    assert table(rows).splitlines()[2:] == [
        "| a | 3 | 1.00 | 2.0 | 1.00 |",
        "| b | 6 | 2.00 | 1.0 | 0.50 |",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_command_line():
    command = ["tools/benchmark_training.py", "--config-file", CONFIG, "--size", "64", "64"]
    command += ["--variant", f"short: {LITTLE}", "--variant", "long", "--seconds", "1"]
    done = subprocess.run(
        [sys.executable, *command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    short, long = (re.findall(r"[\d.]+", line) for line in done.stdout.splitlines()[-2:])
    assert float(long[2]) > float(short[2]) > 0  # extra memory


def test_an_unknown_key_is_named():
    step = Step(str(ROOT / CONFIG), ("model.encoder.leyers=1",), 1, 64, 64, 1)
    with pytest.raises(ValueError, match="^unknown key model.encoder.leyers"):
        measure({"wrong": step}, torch.device("cpu"), budget=1)
