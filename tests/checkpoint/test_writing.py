import os
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch

from dn_detr.checkpoint.reading import read_checkpoint
from dn_detr.checkpoint.writing import as_plain, save_atomically, write_text_atomically


def test_save_and_read_back(tmp_path):
    data = {"model": torch.nn.Linear(2, 3).state_dict(), "iteration": 7, "state": (1, [2.0, None])}
    save_atomically(data, tmp_path / "a.pth")
    loaded = read_checkpoint(tmp_path / "a.pth")
    assert loaded["iteration"] == 7 and loaded["state"] == (1, [2.0, None])
    assert torch.equal(loaded["model"]["weight"], data["model"]["weight"])
    assert loaded["model"]._metadata == data["model"]._metadata
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("step", ["torch.save", "os.fsync", "os.replace"])
def test_failure_leaves_the_former_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.pth"
    save_atomically({"iteration": 1}, path)

    def full_disk(*args, **kwargs):
        if step == "torch.save":
            args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    module, name = step.split(".")
    monkeypatch.setattr({"torch": torch, "os": os}[module], name, full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_atomically({"iteration": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path) == {"iteration": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "last_checkpoint"
    write_text_atomically("a.pth", path)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text_atomically("b.pth", path)
    assert path.read_text() == "a.pth"


def test_plain_values():
    value = {
        "best": np.float64(0.5),
        "array": np.arange(3),
        "path": Path("a/b"),
        "recent": deque([1, 2]),
        "ordered": OrderedDict(a=1),
        "shape": torch.Size([2, 3]),
        "parameter": torch.nn.Parameter(torch.ones(1)),
    }
    plain = as_plain(value)
    assert plain["best"] == 0.5 and type(plain["best"]) is float
    assert torch.equal(plain["array"], torch.arange(3))
    assert plain["path"] == str(Path("a/b")) and plain["recent"] == [1, 2]
    assert plain["shape"] == (2, 3) and type(plain["shape"]) is tuple
    assert type(plain["parameter"]) is torch.Tensor and not plain["parameter"].requires_grad


def test_what_could_not_be_read_back_is_refused_at_once(tmp_path):
    where = r"checkpoint\['trainer'\]\['hooks'\]\[1\] is of type object"
    with pytest.raises(TypeError, match=where):
        save_atomically({"trainer": {"hooks": [1, object()]}}, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())
