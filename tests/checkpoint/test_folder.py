"""Which checkpoint a training goes on from, and which ones go."""

import logging
import os
import random

import pytest
import torch

from dn_detr.checkpoint import folder as module
from dn_detr.checkpoint.folder import find_checkpoint, remove_old_checkpoints
from dn_detr.checkpoint.reading import CheckpointError, read_checkpoint
from dn_detr.checkpoint.writing import save_atomically

NAMES = [f"model_000000{i}.pth" for i in range(1, 5)]


def write(path, iteration):
    data = {
        "model": {"weight": torch.full((64, 64), float(iteration)), "bias": torch.ones(3)},
        "trainer": {"iteration": iteration, "optimizer": {"state": {}}},
        "iteration": iteration,
    }
    save_atomically(data, path)


def training(folder, last="model_0000004.pth"):
    """A folder with checkpoints of the iterations 1 to 4."""
    for i, name in enumerate(NAMES, 1):
        write(folder / name, i)
    if last is not None:
        (folder / "last_checkpoint").write_bytes(last if isinstance(last, bytes) else last.encode())
    return folder


def found(folder):
    path = find_checkpoint(folder)
    return path and os.path.relpath(path, folder)


def cut(content):
    return content[: len(content) // 2]


def flip_in_tensor(content):
    at = content.index(torch.full((64,), 4.0).numpy().tobytes()) + 1000
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def zero_block(content):
    return content[:2048] + bytes(4096) + content[6144:]


def drop_block(content):
    return content[:2048] + content[6144:]


DAMAGE = {
    "cut": cut,
    "cut at the end": lambda content: content[:-1],
    "head only": lambda content: content[:5000],
    "empty": lambda content: b"",
    "a bit in a tensor": flip_in_tensor,
    "a zero block": zero_block,
    "a block is gone": drop_block,
    "all zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"Quota exceeded\n",
    "a web page": lambda content: b"<!DOCTYPE html>",
}


@pytest.mark.fault(20)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_newest_whole_one(tmp_path, caplog, damage):
    folder = training(tmp_path)
    assert found(folder) == NAMES[3]
    path = folder / NAMES[3]
    content = damage(path.read_bytes())
    path.write_bytes(content)
    assert found(folder) == NAMES[2]
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    said = record.getMessage()
    assert f"In {folder}, these cannot be resumed from:\n  {NAMES[3]}: it is " in said
    assert f"Resuming from {folder / NAMES[2]}, the newest that is whole" in said
    assert path.read_bytes() == content  # left as it is


@pytest.mark.fault(20)
def test_no_flipped_bit_is_taken_for_a_whole_file(tmp_path):
    """Every bit of a file that matters is covered by a checksum or by the format."""
    write(tmp_path / "a.pth", 7)
    content = (tmp_path / "a.pth").read_bytes()
    expected = read_checkpoint(tmp_path / "a.pth")
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        at, bit = generator.randrange(len(content)), generator.randrange(8)
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        (tmp_path / "b.pth").write_bytes(flipped)
        try:
            loaded = read_checkpoint(tmp_path / "b.pth")
        except CheckpointError:
            refused += 1
            continue
        assert loaded["trainer"] == expected["trainer"]
        assert all(value.equal(expected["model"][name]) for name, value in loaded["model"].items())
    assert refused > 250  # most of it is tensors


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    "last",
    [
        "model_0000003.pth\n",
        "model_0000003.pth\r\n",
        "  model_0000003.pth \t\n\n",
        "\ufeffmodel_0000003.pth",
        "/moved/since/model_0000003.pth",
        "C:\\moved\\model_0000003.pth\r\n",
        b"model_0000003.pth\0\0\0",
    ],
)
def test_last_checkpoint_with_blanks_or_a_folder(tmp_path, caplog, last):
    assert found(training(tmp_path, last)) == NAMES[2]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    "last, reason",
    [
        (None, "last_checkpoint: it is missing"),
        ("", "last_checkpoint: it is empty"),
        (" \r\n", "last_checkpoint: it is empty"),
        (bytes(17), "last_checkpoint: it is empty"),
        ("somewhere/", "last_checkpoint: it holds no file name but 'somewhere/'"),
        ("model_0000009.pth", "model_0000009.pth: it does not exist"),
        ("..", "..: it is a folder"),
        ("x" * 5000, "x: File name too long"),
        (b"\xff\xfe\x00m", "it does not exist"),
    ],
)
def test_last_checkpoint_that_names_nothing(tmp_path, caplog, last, reason):
    assert found(training(tmp_path, last)) == NAMES[3]
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert reason in record.getMessage()


def test_a_fallback_does_not_go_into_a_future_that_was_given_up(tmp_path):
    folder = training(
        tmp_path, "model_0000003.pth"
    )  # say, 4 was damaged once, and training resumed
    (folder / NAMES[2]).write_bytes(b"")
    assert found(folder) == NAMES[1]
    for name in NAMES[:2]:
        (folder / name).write_bytes(b"")
    assert found(folder) == NAMES[3]  # better than nothing


def test_final_and_best_count_by_their_iteration(tmp_path):
    folder = training(tmp_path, None)
    write(folder / "model_final.pth", 3)
    write(folder / "model_best.pth", 2)
    assert found(folder) == NAMES[3]
    (folder / NAMES[3]).write_bytes(b"")
    assert found(folder) == "model_final.pth"
    for name in NAMES:
        (folder / name).unlink()
    (folder / "model_final.pth").write_bytes(b"")
    assert found(folder) == "model_best.pth"


def test_what_is_no_training_is_not_resumed_from(tmp_path, caplog):
    folder = training(tmp_path, "model_weights.pth")
    save_atomically({"model": {"a": torch.ones(1)}}, folder / "model_weights.pth")
    save_atomically({"model": {}, "trainer": {}}, folder / "model_0000008.pth")
    torch.save([1], folder / "model_0000009.pth")
    (folder / "model_0000010.pth").mkdir()
    assert found(folder) == NAMES[3]
    assert "model_weights.pth: it holds weights only" in caplog.text


@pytest.mark.fault(22)
def test_none_that_is_whole(tmp_path):
    folder = training(tmp_path)
    write(folder / "model_final.pth", 4)
    files = [*NAMES, "model_final.pth"]
    for name in files:
        (folder / name).write_bytes(b"PK\x03\x04cut")
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(folder)
    lines = str(error.value).splitlines()
    assert len(lines) == len(files) + 2 and str(folder) in lines[0]
    for name in files:
        assert any(line.startswith(f"  {name}: it is truncated or damaged") for line in lines)
    assert "train.overwrite=True instead of --resume" in lines[-1]
    assert all((folder / name).read_bytes() == b"PK\x03\x04cut" for name in files)


@pytest.mark.fault(22)
def test_nothing_to_resume(tmp_path):
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    with pytest.raises(CheckpointError, match="model_0000004.pth: it does not exist"):
        find_checkpoint(tmp_path)


def test_a_file_that_cannot_be_read_falls_back(tmp_path, monkeypatch):
    folder = training(tmp_path)

    def broken_disk(path, **kwargs):
        if path.name == NAMES[3]:
            raise OSError(5, "Input/output error")
        return read_checkpoint(path, **kwargs)

    monkeypatch.setattr(module, "read_checkpoint", broken_disk)
    assert found(folder) == NAMES[2]


@pytest.mark.parametrize("name", ["größe 训练", "with [brackets] *", "a" * 200])
def test_names_of_folders(tmp_path, name):
    real = tmp_path / name
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real, target_is_directory=True)
    training(real)
    assert found(real) == found(link) == NAMES[3]
    remove_old_checkpoints(link, 2, 4)
    assert sorted(p.name for p in real.glob("*.pth")) == NAMES[2:]


MIXED = ["model_2020.pth", "model_0000002.pth.bak", "model_final.pth", "model_best.pth", "notes"]


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "iteration, kept",
    [(4, [3, 4]), (5, [3, 4]), (2, [1, 2]), (1, [1, 4]), (3, [2, 3])],
)
def test_the_oldest_go_first_and_nothing_of_others(tmp_path, iteration, kept):
    folder = training(tmp_path)
    for name in MIXED:
        (folder / name).write_text(name)
    (folder / "model_0000000.pth").mkdir()
    remove_old_checkpoints(folder, 2, iteration)
    left = [NAMES[i - 1] for i in kept]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*MIXED, "model_0000000.pth", "last_checkpoint", *left]
    )


def test_a_removal_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    folder = training(tmp_path)
    unlink = module.Path.unlink

    def busy(path, *args, **kwargs):
        if path.name == NAMES[0]:
            raise OSError(16, "Device or resource busy")
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(module.Path, "unlink", busy)
    remove_old_checkpoints(folder, 2, 4)
    assert sorted(p.name for p in folder.glob("*.pth")) == [NAMES[0], *NAMES[2:]]
    assert f"{folder / NAMES[0]} cannot be removed: Device or resource busy" in caplog.text
