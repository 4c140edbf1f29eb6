"""Weights alone, as .safetensors and .pth."""

import errno
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from dn_detr.checkpoint.checkpointer import (
    CheckpointError,
    DNCheckpointer,
    build_metadata,
)
from dn_detr.checkpoint.export import export_weights
from dn_detr.checkpoint.reading import read_checkpoint
from dn_detr.checkpoint.writing import save_weights

TOOL = str(Path(__file__).parents[2] / "tools" / "convert_checkpoint.py")
CATEGORIES = [{"id": 1, "name": "größe"}, {"id": 3, "name": "訓"}]
METADATA = build_metadata("model:\n  name: 'é'\n", CATEGORIES)


def state():
    """All that a state_dict may hold: shared memory, views, other types, scalars, nothing."""
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "a": base,
        "same": base,
        "transposed": base.t(),
        "row": base[1],
        "half": torch.full((2, 2), 1 / 3).bfloat16(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "parameter": nn.Parameter(torch.ones(2)),
    }


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and value.shape == second[name].shape
        assert torch.equal(value, second[name])
    return True


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of a training with averaged weights: (path, model, averaged state)."""
    model, averaged = nn.Linear(3, 2), nn.Linear(3, 2)

    class Average:
        def state_dict(self):
            return {"model": averaged.state_dict(), "updates": 4}

    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = DNCheckpointer(
        model, str(tmp_path), metadata=METADATA, ema=Average(), optimizer=optimizer
    )
    checkpointer.save("model_final", iteration=4)
    return tmp_path / "model_final.pth", model.state_dict(), averaged.state_dict()


@pytest.mark.fault(34)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_and_metadata_come_back_the_same(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_weights(state(), METADATA, path)
    loaded = read_checkpoint(path)
    assert same(loaded["model"], state())
    assert loaded["metadata"] == METADATA
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.fault(34)
def test_pth_to_safetensors_and_back(tmp_path, trained):
    source, model, _ = trained
    there, back = str(tmp_path / "new" / "a.safetensors"), str(tmp_path / "back.pth")
    table = export_weights(str(source), there)
    assert "of the last step" in table and "2, with 8 numbers" in table and "a.safetensors" in table
    export_weights(there, back)
    for path in (there, back):
        assert set(read_checkpoint(path)) == {"model", "metadata"}
        fresh = nn.Linear(3, 2)
        rest = DNCheckpointer(fresh).load_weights(path, categories=CATEGORIES, strict=True)
        assert same(fresh.state_dict(), model) and rest["metadata"] == METADATA


def test_averaged_weights(tmp_path, trained):
    source, _, averaged = trained
    output = tmp_path / "a.safetensors"
    assert "averaged over the training" in export_weights(str(source), str(output), averaged=True)
    assert same(read_checkpoint(output)["model"], averaged)
    with pytest.raises(CheckpointError, match="holds no averaged weights.*train.ema.enabled=True"):
        export_weights(str(output), str(tmp_path / "b.pth"), averaged=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_failure_leaves_the_former_file(tmp_path, trained, monkeypatch, suffix, step):
    output = tmp_path / f"a{suffix}"
    output.write_text("former")

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step.removeprefix("os."), full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_weights(str(trained[0]), str(output))
    assert output.read_text() == "former" and not list(tmp_path.glob(".*"))


def test_what_is_read_back_otherwise_gets_no_name(tmp_path, monkeypatch):
    import safetensors.torch

    save = safetensors.torch.save
    monkeypatch.setattr(
        safetensors.torch,
        "save",
        lambda tensors, metadata: save({k: v + 1 for k, v in tensors.items()}, metadata=metadata),
    )
    with pytest.raises(OSError, match="reads back differently"):
        save_weights({"a": torch.ones(2)}, METADATA, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(tmp_path, trained):
    source = str(trained[0])
    with pytest.raises(CheckpointError, match="source file itself"):
        export_weights(source, source)
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match="no checkpoint of this project.*--config-file FILE"):
        export_weights(str(tmp_path / "published.pth"), str(tmp_path / "a.pth"))
    torch.save(
        {"model": {"a": torch.tensor([torch.nan])}, "metadata": METADATA}, tmp_path / "nan.pth"
    )
    with pytest.raises(CheckpointError, match="nan.pth: a holds numbers that are not finite"):
        export_weights(str(tmp_path / "nan.pth"), str(tmp_path / "a.pth"))
    assert not (tmp_path / "a.pth").exists()


def tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(TOOL, run_name="__main__")
    return status.value.code


def test_tool(tmp_path, trained, monkeypatch, capsys):
    source, _, averaged = trained
    assert tool(monkeypatch, source, tmp_path / "a.safetensors", "--averaged") == 0
    assert "averaged over the training" in capsys.readouterr().out
    assert same(read_checkpoint(tmp_path / "a.safetensors")["model"], averaged)
    assert tool(monkeypatch, tmp_path / "none.pth", tmp_path / "b.pth") == 1
    assert capsys.readouterr().err.startswith(f"error: Checkpoint {tmp_path}/none.pth does not")
    assert tool(monkeypatch, source, tmp_path / "b.pth", "model.num_classes=3") == 2
    assert "overrides need a --config-file" in capsys.readouterr().err
    config = ("--config-file", "projects/dn_detr/configs/dn_detr_r50_50ep.py")
    assert tool(monkeypatch, source, tmp_path / "b.pth", "--averaged", *config) == 2
    assert "without --config-file" in capsys.readouterr().err
