"""The plain PyTorch script where detectron2 and its companions are missing, and its README."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dn_detr.data.shapes import generate_shapes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "projects" / "plain_pytorch"

# Python imports a module of this name at its start: so these are missing where the script runs.
SITECUSTOMIZE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"detectron2", "fvcore", "iopath", "omegaconf", "pycocotools"}:
            raise ImportError(f"{name} is blocked by the test")
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture(scope="module")
def plain_env(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]))
    probe = subprocess.run([sys.executable, "-c", "import fvcore"], env=env, capture_output=True)
    assert b"blocked by the test" in probe.stderr
    return env


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "set"
    return generate_shapes(str(root), size=64, num_train=12, num_val=3)


def start(env, *options):
    command = [sys.executable, str(FOLDER / "train.py"), "--device", "cpu", *map(str, options)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def reports(plain_env, data, tmp_path_factory):
    """What runs of three steps leave, without denoising (False) and with it (True)."""
    result = {}
    for denoising in (False, True):
        output = tmp_path_factory.mktemp("output")
        flags = ["--data", data, "--output", output, "--steps", 3, "--batch-size", 4]
        done = start(plain_env, *flags, *([] if denoising else ["--no-denoising"]))
        assert done.returncode == 0, done.stderr
        assert "step 3/3" in done.stdout and "AP50 (this script's, on 3 images)" in done.stdout
        result[denoising] = output, json.loads((output / "curve.json").read_text())
    return result


@pytest.mark.parametrize("denoising", [False, True])
def test_what_the_script_leaves(reports, denoising):
    output, report = reports[denoising]
    assert [point["step"] for point in report["curve"]] == [1, 2, 3]
    losses = {"matching", "denoising"} if denoising else {"matching"}
    assert all(set(point) == {"step", "seconds"} | losses for point in report["curve"])
    assert all(math.isfinite(point[name]) for point in report["curve"] for name in losses)
    assert 0 <= report["result"]["ap50_of_this_script"] <= 1
    assert all(
        value.isfinite().all()
        for value in torch.load(output / "model.pth", weights_only=True).values()
    )
    with Image.open(output / "predictions.png") as picture:
        assert np.asarray(picture).std() > 10  # something is drawn


def test_denoising_is_the_only_difference(reports):
    """As many parameters; and the same first loss, so the same weights, images and matching."""
    off, on = (reports[denoising][1] for denoising in (False, True))
    assert off["result"]["learnable_parameters"] == on["result"]["learnable_parameters"]
    shapes = [
        {name: value.shape for name, value in torch.load(output / "model.pth").items()}
        for output, _ in reports.values()
    ]
    assert shapes[0] == shapes[1]
    assert off["curve"][0]["matching"] == pytest.approx(on["curve"][0]["matching"], rel=1e-4)


def test_data_of_several_sizes_is_refused(data, tmp_path):
    coco = json.loads(Path(data, "train.json").read_text())
    coco["images"][0]["width"] += 1
    (tmp_path / "train.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="train.json.*images of one size"):
        runpy.run_path(str(FOLDER / "train.py"))["read_split"](tmp_path, "train")


def test_measure():
    """The area under the curve of two objects; a second box on one of them is wrong."""
    script = runpy.run_path(str(FOLDER / "train.py"))
    truth = script["Split"](
        images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        labels=[torch.tensor([0, 0])],
        boxes=[torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])],
        class_names=["a", "absent"],
    )
    first, second = [0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.8, 0.8]

    def measure(*boxes):
        scores = torch.linspace(0.9, 0.1, len(boxes))
        found = scores, torch.zeros(len(boxes), dtype=torch.long), torch.tensor(boxes).view(-1, 4)
        return script["ap50"]([found], truth)

    assert measure(first, second) == pytest.approx({"a": 1.0})
    assert measure(first) == pytest.approx({"a": 0.5})
    assert measure(first, first, second) == pytest.approx({"a": 0.5 + 0.5 * 2 / 3})
    assert measure() == {"a": 0.0}


def readme_blocks():
    text = (FOLDER / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run(blocks):
    names = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)
    return names


def test_the_lines_of_the_readme_run():
    blocks = readme_blocks()
    assert len(blocks) == 8
    names = run(blocks)
    losses = {**names["losses"], **names["dn_losses"]}
    assert {"loss_ce", "dn_loss_ce", "dn_loss_giou", "dn_loss_box_reg"} <= set(losses)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    modules = [value for value in names.values() if isinstance(value, torch.nn.Module)]
    assert len(modules) == 10
    assert all(p.grad is not None for module in modules for p in module.parameters())
    assert [len(slots) for slots, _ in names["indices"]] == [10, 5]


def test_the_readme_s_steps_need_no_object():
    """No object in the batch: the denoising part loses nothing, and every parameter takes part."""
    blocks = readme_blocks()
    empty = "targets = Targets.pad([torch.zeros(0).long()] * 2, [torch.zeros(0, 4)] * 2)"
    names = run([blocks[0], empty, *blocks[1:6]])
    assert all(loss == 0 for name, loss in names["losses"].items() if name.startswith("dn_"))
    modules = [names[name] for name in ("label_embed", "box_embed", "decoder", "class_head")]
    assert all(p.grad is not None for module in modules for p in module.parameters())
