import argparse
import logging
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dn_detr.checkpoint import reading
from dn_detr.checkpoint.reading import CheckpointError, read_checkpoint


class _Evil:
    """Unpickling it freely would create the canary file."""

    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


class _EvilEval(_Evil):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.canary!r})",)


@pytest.mark.fault(29)
@pytest.mark.parametrize("evil", [_Evil, _EvilEval])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pyth"])
def test_pth_that_would_run_code_is_refused(tmp_path, evil, suffix):
    canary, path = tmp_path / "canary", tmp_path / f"evil{suffix}"
    torch.save({"model": {"a": torch.zeros(1)}, "args": evil(canary)}, path)
    with pytest.raises(CheckpointError, match=r"refused: it refers to (posix\.mkdir|eval)"):
        read_checkpoint(path)
    assert not canary.exists()


@pytest.mark.fault(29)
@pytest.mark.fault(30)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_bare_pickle_that_would_run_code_is_refused(tmp_path, suffix, protocol):
    canary, path = tmp_path / "canary", tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps({"model": _Evil(canary)}, protocol=protocol))
    with pytest.raises(CheckpointError, match="evil"):
        read_checkpoint(path)
    assert not canary.exists()


@pytest.mark.fault(30)
@pytest.mark.parametrize("evil", [_Evil, _EvilEval])
def test_pkl_names_what_it_refused(tmp_path, evil):
    canary, path = tmp_path / "canary", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": np.zeros(2)}, "x": evil(canary)}))
    with pytest.raises(CheckpointError, match=r"it refers to (posix\.mkdir|builtins\.eval)"):
        read_checkpoint(path)
    assert not canary.exists()


@pytest.mark.fault(30)
def test_pkl_refuses_other_codecs(tmp_path):
    class Encoded:
        def __reduce__(self):
            import _codecs

            return _codecs.encode, ("abc", "rot13")

    path = tmp_path / "codec.pkl"
    path.write_bytes(pickle.dumps({"a": Encoded()}, protocol=2))
    with pytest.raises(CheckpointError, match="latin1"):
        read_checkpoint(path)


@pytest.mark.fault(30)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_zoo_pkl_loads(tmp_path, protocol):
    model = OrderedDict(
        a=np.arange(6, dtype=np.float32).reshape(2, 3),
        fortran=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        scalar=np.float32(0.5),
    )
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": model, "__author__": "me"}, protocol=protocol))
    loaded = read_checkpoint(path)
    assert loaded["__author__"] == "me"
    for name, array in model.items():
        assert np.array_equal(loaded["model"][name], array)


@pytest.mark.fault(30)
def test_zoo_pkl_of_python_2_loads(tmp_path):
    # {'a': numpy.zeros(1, 'u1') with the byte 0xe9}, as Python 2 and numpy 1 wrote it
    text = (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x01\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff"
        b"\xffJ\xff\xff\xff\xffK\x00tb\x89U\x01\xe9tbs."
    )
    path = tmp_path / "old.pkl"
    path.write_bytes(text)
    assert read_checkpoint(path)["a"].tolist() == [0xE9]


@pytest.mark.fault(32)
def test_namespace_numpy_scalars_and_paths_load(tmp_path):
    path = tmp_path / "official.pth"
    args = argparse.Namespace(lr=1e-4, dilation=True, output_dir=Path("out"), names=["a"])
    torch.save({"model": {"a": torch.ones(2)}, "args": args, "best": np.float64(0.5)}, path)
    loaded = read_checkpoint(path)
    assert loaded["args"] == args and loaded["best"] == 0.5
    assert torch.equal(loaded["model"]["a"], torch.ones(2))


@pytest.mark.fault(32)
def test_allowing_namespaces_ends_with_the_call(tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"args": argparse.Namespace()}, path)
    read_checkpoint(path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.fault(17)
def test_missing_file_lists_what_lies_beside(tmp_path):
    torch.save({}, tmp_path / "model_final.pth")
    with pytest.raises(CheckpointError, match=r"does not exist.*model_final\.pth"):
        read_checkpoint(tmp_path / "model_finale.pth")
    with pytest.raises(CheckpointError, match=r"is a folder.*model_final\.pth"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist. No \.pth file"):
        read_checkpoint(tmp_path / "nowhere" / "model_final.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_truncated_file(tmp_path, suffix, part):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save({"model": {"a": torch.zeros(5000)}}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {"a": np.zeros(5000)}}))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointError, match=r"cut\.\w+ .*(truncated|bytes\))"):
        read_checkpoint(path)


def test_empty_file_and_web_page(tmp_path):
    (tmp_path / "empty.pth").touch()
    with pytest.raises(CheckpointError, match="empty"):
        read_checkpoint(tmp_path / "empty.pth")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>Virus scan warning</html>")
    with pytest.raises(CheckpointError, match="web page"):
        read_checkpoint(tmp_path / "page.pth")


@pytest.mark.parametrize("version, warned", [("2.9.1+cu130", True), ("2.10.0", False)])
def test_old_torch_is_warned_of_once(monkeypatch, caplog, version, warned):
    monkeypatch.setattr(torch, "__version__", version)
    reading._warn_if_unsafe.cache_clear()
    with caplog.at_level(logging.WARNING):
        reading._warn_if_unsafe()
        reading._warn_if_unsafe()
    reading._warn_if_unsafe.cache_clear()
    assert len(caplog.records) == warned


def test_a_file_written_without_checksums_loads(tmp_path):
    set_options = pytest.importorskip("torch.serialization").set_crc32_options
    path = tmp_path / "a.pth"
    set_options(False)
    try:
        torch.save({"a": torch.ones(100)}, path)
    finally:
        set_options(True)
    assert read_checkpoint(path)["a"].equal(torch.ones(100))


@pytest.mark.fault(34)
def test_safetensors_of_others(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert torch.equal(read_checkpoint(tmp_path / "x.safetensors")["a"], torch.ones(2))


@pytest.mark.fault(34)
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_truncated_safetensors(tmp_path, part):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2000)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(CheckpointError, match=r"x.safetensors .*(truncated|empty)"):
        read_checkpoint(path)


def test_safetensors_names_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "x.safetensors").write_bytes(b"some")
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_legacy_torch_format_loads(tmp_path):
    path = tmp_path / "legacy.pth"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(2))
