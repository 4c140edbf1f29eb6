import logging
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from detectron2.modeling.backbone import BasicStem, ResNet  # noqa: E402

from dn_detr.checkpoint.checkpointer import (  # noqa: E402
    CheckpointError,
    DNCheckpointer,
    build_metadata,
)
from dn_detr.checkpoint.reading import read_checkpoint  # noqa: E402
from tests.golden.seeded import published_state_dict  # noqa: E402


class Detector(nn.Module):
    """What a detector looks like to a checkpointer: a backbone, parameters, and class rows."""

    def __init__(self, num_classes: int, depth: int = 0, heads: int = 1):
        super().__init__()
        if depth:
            stages = ResNet.make_default_stages(depth, stride_in_1x1=False, norm="FrozenBN")
            self.backbone = ResNet(BasicStem(norm="FrozenBN"), stages, out_features=["res5"])
        else:
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1))
        self.neck = nn.Linear(4, 8)
        self.heads = nn.Module()
        linear = [nn.Linear(8, num_classes) for _ in range(heads)]
        self.heads.class_embed = linear[0] if heads == 1 else nn.ModuleList(linear)
        self.queries = nn.Module()
        self.queries.label_embed = nn.Embedding(num_classes + 1, 7)
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1), persistent=False)


def named(*names: str, first: int = 1, step: int = 1) -> list[dict]:
    return [{"id": first + i * step, "name": name} for i, name in enumerate(names)]


def save(model: nn.Module, folder, categories=(), name: str = "model", **extra) -> str:
    DNCheckpointer(model, str(folder), metadata=build_metadata("a: 1\n", categories)).save(
        name, **extra
    )
    return str(folder / f"{name}.pth")


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(mine[k].equal(theirs[k]) for k in mine)


ABC = named("a", "b", "c")


def test_checkpoint_carries_its_metadata(tmp_path):
    path = save(Detector(3), tmp_path, ABC, iteration=4)
    loaded = read_checkpoint(path)
    assert loaded["metadata"] == {"format_version": 1, "config": "a: 1\n", "categories": ABC}
    assert loaded["iteration"] == 4
    assert torch.load(path, weights_only=True)["metadata"] == loaded["metadata"]


@pytest.mark.parametrize("strict", [True, False])
def test_load_weights_of_the_same_classes(tmp_path, strict, caplog):
    model, other = Detector(3), Detector(3)
    rest = DNCheckpointer(other).load_weights(
        save(model, tmp_path, ABC, iteration=4), categories=ABC, strict=strict
    )
    assert same(model, other)
    assert rest["iteration"] == 4 and rest["metadata"]["categories"] == ABC
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_resume_restores_model_and_state(tmp_path):
    model, other = Detector(3), Detector(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    checkpointer = DNCheckpointer(model, str(tmp_path), optimizer=optimizer)
    assert not checkpointer.has_checkpoint()
    checkpointer.save("model_0000003", iteration=3)
    checkpointer.save("model_0000007", iteration=7)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    resumed = DNCheckpointer(other, str(tmp_path), optimizer=optimizer)
    rest = resumed.resume_or_load("", resume=True)
    assert rest["iteration"] == 7 and same(model, other)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert len(resumed.get_all_checkpoint_files()) == 2


@pytest.mark.fault(24)
def test_failed_save_leaves_checkpoint_and_tag(tmp_path, monkeypatch):
    model = Detector(3)
    checkpointer = DNCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000003", iteration=3)

    def full_disk(data, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    for name in ("model_0000003", "model_0000007"):
        with pytest.raises(OSError, match="No space"):
            checkpointer.save(name, iteration=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000003.pth"]
    assert DNCheckpointer(model, str(tmp_path)).resume_or_load("")["iteration"] == 3


@pytest.mark.fault(23)
def test_a_save_removes_what_a_killed_process_left(tmp_path):
    for name in ("model_0000003", "model_0000005"):
        (tmp_path / f".{name}.pth.tmp").write_bytes(b"half a file")
    save(Detector(3), tmp_path, name="model_0000003")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000003.pth"]


def test_load_can_be_tried_again_after_a_failure(tmp_path):
    checkpointer = DNCheckpointer(Detector(3))
    path = save(Detector(3), tmp_path)
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(CheckpointError, match="truncated"):
        checkpointer.load(str(tmp_path / "cut.pth"))
    checkpointer.load(path)


@pytest.mark.fault(29)
@pytest.mark.fault(30)
@pytest.mark.parametrize("name", ["evil.pth", "evil.pkl"])
def test_no_way_of_loading_runs_code(tmp_path, name):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    path = tmp_path / name
    data = {"model": Detector(3).state_dict() if name.endswith("pth") else {}, "x": Evil()}
    torch.save(data, path) if name.endswith("pth") else path.write_bytes(pickle.dumps(data))
    checkpointer = DNCheckpointer(Detector(3), str(tmp_path))
    (tmp_path / "last_checkpoint").write_text(name)
    with pytest.raises(CheckpointError, match="refers to posix.mkdir"):
        checkpointer.resume_or_load("", resume=True)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match="refers to posix.mkdir"):
            checkpointer.load_weights(str(path), categories=ABC, strict=strict)
    assert not (tmp_path / "canary").exists()


def test_weights_of_a_ddp_model_load(tmp_path):
    model, other = Detector(3), Detector(3)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "ddp.pth")
    DNCheckpointer(other).load_weights(str(tmp_path / "ddp.pth"), categories=ABC, strict=True)
    assert same(model, other)


@pytest.mark.fault(19)
@pytest.mark.parametrize("heads", [1, 3])
def test_class_rows_move_by_name(tmp_path, caplog, heads):
    model, other = Detector(3, heads=heads), Detector(4, heads=heads)
    fresh = {k: v.clone() for k, v in other.state_dict().items()}
    path = save(model, tmp_path, ABC)
    with caplog.at_level(logging.INFO):
        DNCheckpointer(other).load_weights(
            path, categories=named("C ", "x", "a", "y"), strict=False
        )
    lines = [r.getMessage() for r in caplog.records if "by name" in r.getMessage()]
    assert len(lines) == 1 and "kept by name: 2 (C , a); new ones: 2 (x, y)" in lines[0]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    old, new = model.state_dict(), other.state_dict()
    rows = [k for k in new if "class_embed" in k] + ["queries.label_embed.weight"]
    assert len(rows) == 2 * heads + 1
    for key in rows:
        assert new[key][0].equal(old[key][2]) and new[key][2].equal(old[key][0])
        assert new[key][1].equal(fresh[key][1]) and new[key][3].equal(fresh[key][3])
    assert new["queries.label_embed.weight"][4].equal(old["queries.label_embed.weight"][3])
    assert new["neck.weight"].equal(old["neck.weight"])


@pytest.mark.fault(19)
def test_as_many_other_classes_are_not_taken_for_the_same(tmp_path):
    model, other = Detector(3), Detector(3)
    fresh = other.heads.class_embed.weight.detach().clone()
    DNCheckpointer(other).load_weights(
        save(model, tmp_path, ABC), categories=named("a", "x", "y"), strict=False
    )
    assert other.heads.class_embed.weight[0].equal(model.heads.class_embed.weight[0])
    assert other.heads.class_embed.weight[1:].equal(fresh[1:])


def test_class_rows_move_between_category_ids_and_contiguous_classes(tmp_path):
    categories = named("a", "b", "c", first=2, step=2)  # ids 2, 4, 6
    by_id, contiguous = Detector(7), Detector(3)
    path = save(by_id, tmp_path, categories)
    DNCheckpointer(contiguous).load_weights(path, categories=categories, strict=False)
    assert contiguous.heads.class_embed.weight.equal(by_id.heads.class_embed.weight[[2, 4, 6]])
    assert contiguous.queries.label_embed.weight.equal(
        by_id.queries.label_embed.weight[[2, 4, 6, 7]]
    )
    again = Detector(7)
    DNCheckpointer(again).load_weights(path, categories=categories, strict=True)
    assert same(by_id, again)
    with pytest.raises(CheckpointError, match="model.num_classes=7"):
        DNCheckpointer(Detector(3)).load_weights(path, categories=categories, strict=True)


def test_file_without_class_names(tmp_path):
    model, other, more = Detector(3), Detector(3), Detector(4)
    path = save(model, tmp_path)
    DNCheckpointer(other).load_weights(path, categories=ABC, strict=True)
    assert same(model, other)
    fresh = more.heads.class_embed.weight.detach().clone()
    DNCheckpointer(more).load_weights(path, categories=named(*"abcd"), strict=False)
    assert more.heads.class_embed.weight.equal(fresh)
    assert more.queries.label_embed.weight[4].equal(model.queries.label_embed.weight[3])


@pytest.mark.fault(19)
def test_strict_refuses_other_classes(tmp_path):
    path = save(Detector(3), tmp_path, ABC)
    checkpointer = DNCheckpointer(Detector(3))
    with pytest.raises(CheckpointError, match="3 and 3. Only in the checkpoint: b, c; only.*x, y"):
        checkpointer.load_weights(path, categories=named("a", "x", "y"), strict=True)
    with pytest.raises(CheckpointError, match="another order"):
        checkpointer.load_weights(path, categories=named("b", "a", "c"), strict=True)
    with pytest.raises(CheckpointError, match="3 and 2. Only in the checkpoint: c; .*data: -"):
        DNCheckpointer(Detector(2)).load_weights(path, categories=named("a", "b"), strict=True)


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("neck.bias"), r"missing in the file: 1 \(neck.bias\)"),
        (lambda s: s.update(extra=torch.ones(1)), r"unknown to the model: 1 \(extra\)"),
        (
            lambda s: s.update({"neck.weight": torch.ones(8, 5)}),
            r"another shape: 1 \(neck.weight: \(8, 5\) in the file, \(8, 4\) in the model\)",
        ),
    ],
)
def test_strict_refuses_what_does_not_fit(tmp_path, change, message):
    state = Detector(3).state_dict()
    change(state)
    torch.save({"model": state}, tmp_path / "odd.pth")
    model = Detector(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        DNCheckpointer(model).load_weights(str(tmp_path / "odd.pth"), categories=ABC, strict=True)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    DNCheckpointer(model).load_weights(str(tmp_path / "odd.pth"), categories=ABC, strict=False)


@pytest.mark.fault(18)
@pytest.mark.parametrize("strict", [True, False])
def test_nothing_that_fits_is_an_error(tmp_path, strict):
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as error:
        DNCheckpointer(Detector(3)).load_weights(
            str(tmp_path / "other.pth"), categories=ABC, strict=strict
        )
    assert str(error.value).splitlines()[:3] == [
        f"Checkpoint {tmp_path}/other.pth does not fit the model: 0 of 7 entries fit.",
        "  missing in the file: 7 (backbone.0.bias, backbone.0.weight, heads.class_embed.bias, "
        "heads.class_embed.weight, neck.bias, ...)",
        "  unknown to the model: 1 (conv1.weight)",
    ]
    assert "of another shape" not in str(error.value)


@pytest.mark.fault(33)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_tensor_that_is_not_finite_is_named(tmp_path, value):
    good, bad = Detector(3), Detector(3)
    model = Detector(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("neck.bias", "neck.weight", "heads.class_embed.bias"):
        bad.state_dict()[name].view(-1)[1] = value
    torch.save({"model": bad.state_dict()}, tmp_path / "bad.pth")
    data = {"model": good.state_dict(), "ema": {"model": bad.state_dict(), "updates": 3}}
    torch.save(data, tmp_path / "ema.pth")
    for name, where in (("bad", "bad.pth"), ("ema", r"ema.pth \(averaged weights\)")):
        with pytest.raises(
            CheckpointError, match=rf"{where}: neck.weight holds .* not finite.* diverged"
        ):
            DNCheckpointer(model).load_weights(
                str(tmp_path / f"{name}.pth"), categories=ABC, strict=True
            )
        assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_unusable_contents(tmp_path):
    checkpointer = DNCheckpointer(Detector(3))

    def load(data, **kwargs):
        torch.save(data, tmp_path / "bad.pth")
        checkpointer.load_weights(str(tmp_path / "bad.pth"), categories=ABC, strict=False)

    state = Detector(3).state_dict()
    with pytest.raises(CheckpointError, match="'state_dict' is a dict, not a tensor"):
        load({"state_dict": {}})
    with pytest.raises(CheckpointError, match="holds a list"):
        load([1])
    with pytest.raises(CheckpointError, match="format version 2.*upgrade"):
        load({"model": state, "metadata": {"format_version": 2}})


@pytest.mark.fault(32)
@pytest.mark.parametrize("strict", [True, False])
def test_published_files_are_to_be_converted(tmp_path, strict):
    torch.save({"model": published_state_dict("dn_dab_detr_r50")}, tmp_path / "official.pth")
    with pytest.raises(CheckpointError, match="official DN-DETR.*tools/convert_checkpoint.py"):
        DNCheckpointer(Detector(3)).load_weights(
            str(tmp_path / "official.pth"), categories=ABC, strict=strict
        )


def zoo_backbone(depth: int, path) -> str:
    """A file named and built as detectron2's ImageNetPretrained/torchvision/R-50.pkl."""
    state = Detector(1, depth).backbone.state_dict()
    model = {k: torch.randn_like(v).numpy() for k, v in state.items()}
    model["stem.fc.weight"] = torch.randn(10, 2048).numpy()
    model["stem.fc.bias"] = torch.randn(10).numpy()
    data = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(data))
    return str(path)


def test_imagenet_backbone_goes_into_the_backbone_only(tmp_path, caplog):
    path = zoo_backbone(50, tmp_path / "R-50.pkl")
    model = Detector(3, depth=50)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        DNCheckpointer(model).load_weights(path, categories=ABC, strict=False)
    weights = read_checkpoint(path)["model"]
    for name, value in model.state_dict().items():
        if name.startswith("backbone."):
            assert np.array_equal(value.numpy(), weights[name.removeprefix("backbone.")])
        else:
            assert value.equal(before[name])
    mine = [r for r in caplog.records if r.name.startswith("dn_detr")]
    assert len(mine) == 1 and "265 entries loaded into the backbone" in mine[0].getMessage()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    with pytest.raises(CheckpointError, match="missing in the file: 5"):
        DNCheckpointer(model).load_weights(path, categories=ABC, strict=True)


@pytest.mark.parametrize("file, depth, message", [(50, 101, "255 of its 520"), (101, 50, "255 of")])
def test_imagenet_backbone_of_another_depth_is_refused(tmp_path, file, depth, message):
    path = zoo_backbone(file, tmp_path / "R.pkl")
    with pytest.raises(CheckpointError, match=message):
        DNCheckpointer(Detector(3, depth=depth)).load_weights(path, categories=ABC, strict=False)


def test_imagenet_backbone_without_partner_is_refused(tmp_path):
    path = zoo_backbone(50, tmp_path / "R-50.pkl")
    with pytest.raises(CheckpointError, match="0 of 7 entries fit"):
        DNCheckpointer(Detector(3)).load_weights(path, categories=ABC, strict=False)
