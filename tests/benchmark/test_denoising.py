"""The benchmark of denoising: its ways compute the same, and differ in what they hold."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from dn_detr.benchmark import denoising
from dn_detr.benchmark.denoising import PUBLISHED, Row, Setting, table, training_step, ways
from dn_detr.layers import generalized_box_iou

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")
SMALL = Setting(
    batch=2,
    queries=9,
    layers=2,
    embed_dim=16,
    heads=2,
    feedforward_dim=32,
    classes=5,
    memory=(3, 4),
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def saved_bytes(way, objects: int) -> int:
    """What autograd holds for a backward pass, every storage once."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    step, targets = training_step(way, SMALL, CPU), SMALL.targets(objects, CPU)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(targets)
    return sum(held.values())


def test_ways_of_as_many_groups_have_the_same_loss() -> None:
    losses, slots = {}, {}
    for way in ways(groups=3, budgets=[100, 8]):
        slots[way.name], losses[way.name] = training_step(way, SMALL, CPU)(SMALL.targets(4, CPU))
    assert list(slots.values()) == [12, 12, 12, 12, 8]
    *same, other = losses.values()
    for loss in same[1:]:
        torch.testing.assert_close(loss, same[0], rtol=1e-4, atol=0)
    assert abs(other - same[0]) > 1e-3 * same[0]


def test_each_way_holds_less_than_the_one_before() -> None:
    published, pairs, kernel, budget = (saved_bytes(way, 20) for way in ways(5, [20]))
    assert published > pairs > kernel > budget
    layers, targets, queries, heads = 2, 2 * 5 * 20, 5 * 20 + 9, 2
    # At least the intersections and unions of all pairs, and the weights of all queries (in the
    # place of one head's, the kernel holds the mask as numbers).
    assert published - pairs > layers * 2 * 4 * targets**2
    assert pairs - kernel > layers * 4 * 2 * (heads - 1) * queries**2


def test_the_formulas_in_place_of_ours() -> None:
    torch.manual_seed(0)
    low = torch.rand(2, 3, 4, 3, 2)
    boxes = torch.cat([low, low + torch.rand_like(low)], dim=-1)
    a, b = boxes.unbind(3)[:2]
    expected = generalized_box_iou(a, b)
    torch.testing.assert_close(denoising.diagonal_of_all_pairs(a, b), expected, rtol=0, atol=1e-4)
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    allowed = torch.rand(2, 1, 5, 5) < 0.7
    allowed |= torch.eye(5, dtype=torch.bool)
    for mask in (None, allowed):
        torch.testing.assert_close(
            denoising.attention_with_weights(query, key, value, mask),
            torch.nn.functional.scaled_dot_product_attention(query, key, value, mask),
        )


def test_nothing_stays_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    way, calls = ways(2, [])[0], []
    original = torchvision.ops.generalized_box_iou
    monkeypatch.setattr(
        torchvision.ops, "generalized_box_iou", lambda *a: calls.append(a) or original(*a)
    )
    training_step(way, SMALL, CPU)(SMALL.targets(2, CPU))
    assert len(calls) == 2 * SMALL.layers  # matching and denoising part
    training_step(ways(2, [])[2], SMALL, CPU)(SMALL.targets(2, CPU))
    assert len(calls) == 2 * SMALL.layers


@needs_linux
def test_peaks() -> None:
    """In processes of their own: the published way takes at least the matrices that it holds."""
    published, ours = (denoising.measure(way, SMALL, 100, CPU) for way in ways(5, [])[::2])
    assert published.slots == ours.slots == 500
    assert published.memory - ours.memory > 2 * 2 * 4 * (2 * 500) ** 2
    assert ours.memory > 0


def test_table() -> None:
    rows = [
        Row(10, PUBLISHED, 50, 2**22),
        Row(10, "ours", 50, 2**20),
        Row(500, "ours", 500, 2**23),
    ]
    assert table(rows).splitlines()[2:] == [
        "| 10 | published | 50 | 4.0 | 1.00 |",
        "| 10 | ours | 50 | 1.0 | 0.25 |",
        "| 500 | ours | 500 | 8.0 |  |",
    ]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Runs tools/benchmark_denoising.py with options."""
    path = ROOT / "tools/benchmark_denoising.py"
    spec = importlib.util.spec_from_file_location("benchmark_denoising", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    threads = torch.get_num_threads()

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", [path.name, *options])
        tool.main()

    yield run
    torch.set_num_threads(threads)


def fake_measure(way, setting, objects, device) -> Row:
    if way.name == "+ attention in one kernel":
        raise RuntimeError("out of memory")
    assert (setting.batch, setting.layers) == (2, 1)
    return Row(objects, way.name, objects * way.groups, 2**20 * objects)


def test_script(script, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(denoising, "measure", fake_measure)
    options = "--objects 3,4 --budgets 9 --groups 2 --batch 2 --layers 1 --device cpu --threads 1"
    script(*options.split(), "--output", str(tmp_path))
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line[:3] in ("| 3", "| 4")]
    assert [line.split(" | ")[1] for line in lines] == 2 * [
        *(PUBLISHED, "+ GIoU of its pairs alone", "+ budget of 9 (ours)")
    ]
    assert captured.err.count("not measured: out of memory") == 2
    content = json.loads((tmp_path / "denoising.json").read_text())
    assert content["rows"][0] == {
        **dict(objects=3, way=PUBLISHED, slots=6, memory=3 * 2**20),
    }
    assert content["environment"]["batch"] == 2
    assert lines[0] in (tmp_path / "denoising.md").read_text()


def test_script_refuses(script, capsys) -> None:
    with pytest.raises(SystemExit):
        script("--objects", "10,0")
    assert "'10,0': numbers are needed, such as 10,100" in capsys.readouterr().err
