import errno
import io
import os
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch

from dn_detr.checkpoint.reading import read_checkpoint
from dn_detr.checkpoint.writing import (
    as_plain,
    remove_leftovers,
    save_atomically,
    write_text_atomically,
)


def test_save_and_read_back(tmp_path):
    data = {"model": torch.nn.Linear(2, 3).state_dict(), "iteration": 7, "state": (1, [2.0, None])}
    save_atomically(data, tmp_path / "a.pth")
    loaded = read_checkpoint(tmp_path / "a.pth")
    assert loaded["iteration"] == 7 and loaded["state"] == (1, [2.0, None])
    assert torch.equal(loaded["model"]["weight"], data["model"]["weight"])
    assert loaded["model"]._metadata == data["model"]._metadata
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.fault(24)
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


@pytest.mark.fault(24)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_disk_that_is_really_full(tmp_path, size):
    path = tmp_path / "a.pth"
    save_atomically({"iteration": 1}, path)
    (tmp_path / ".a.pth.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        save_atomically({"a": torch.zeros(size)}, path)
    assert error.value.errno == errno.ENOSPC
    assert read_checkpoint(path) == {"iteration": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.fault(24)
def test_an_error_that_torch_hides_is_one_of_the_disk(tmp_path):
    """torch's writer raises a RuntimeError where a file gets larger than is allowed."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_atomically({"a": torch.zeros(1_000_000)}, tmp_path / "a.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(24)
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_what_is_not_written_as_it_was_meant_gets_no_name(tmp_path, monkeypatch, damage):
    """A disk, or a file system in user space, may lose data without an error."""
    path = tmp_path / "a.pth"
    save_atomically({"iteration": 1}, path)
    save = torch.save

    def lossy(data, file):
        whole = io.BytesIO()
        save(data, whole)
        content = whole.getvalue()
        lost = content[:-100] if damage == "cut" else content.replace(b"\0\0\x80?", b"\0\0\x81?")
        assert lost != content
        file.write(lost)

    monkeypatch.setattr(torch, "save", lossy)
    with pytest.raises(OSError, match="reads back damaged") as error:
        save_atomically({"a": torch.ones(100)}, path)
    assert error.value.errno == errno.EIO and error.value.filename == str(path)
    assert read_checkpoint(path) == {"iteration": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.fault(23)
def test_what_a_killed_process_left_is_replaced_or_removed(tmp_path):
    for name in ("a.pth", "model_0000001.pth", "notes"):
        (tmp_path / f".{name}.tmp").write_bytes(b"half a file")
    save_atomically({"iteration": 1}, tmp_path / "a.pth")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".notes.tmp", "a.pth"]
    assert read_checkpoint(tmp_path / "a.pth") == {"iteration": 1}


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "last_checkpoint"
    write_text_atomically("a.pth", path)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text_atomically("b.pth", path)
    assert path.read_text() == "a.pth"
    assert [p.name for p in tmp_path.iterdir()] == ["last_checkpoint"]


@pytest.mark.fault(31)
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


@pytest.mark.fault(31)
def test_what_could_not_be_read_back_is_refused_at_once(tmp_path):
    where = r"checkpoint\['trainer'\]\['hooks'\]\[1\] is of type object"
    with pytest.raises(TypeError, match=where):
        save_atomically({"trainer": {"hooks": [1, object()]}}, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())
