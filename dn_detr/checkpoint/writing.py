"""Writes checkpoints: plain data only, and whole or not at all."""

import os
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

FORMAT_VERSION = 1


def build_metadata(config: str, categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a checkpoint says of itself, under the key "metadata".

    Args:
        config: the whole config as YAML.
        categories: in class order, each with "id" and "name" (as in a COCO file).
    """
    return {
        "format_version": FORMAT_VERSION,
        "config": config,
        "categories": [{"id": int(c["id"]), "name": str(c["name"])} for c in categories],
    }


def save_atomically(data: Mapping[str, Any], path: str | Path) -> None:
    """Writes `data` so that `path` holds, at any moment, the former file or the whole new one.

    The file is written under another name in the same folder, forced to the disk, and renamed.
    What a failure leaves behind does not end in ".pth", and the next save of that name replaces it.

    Raises:
        TypeError: `data` holds something that only a free unpickler could read back.
        OSError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    plain = as_plain(data)
    try:
        with temporary.open("wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text_atomically(text: str, path: str | Path) -> None:
    """As `save_atomically`, for a small text."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_plain(value: Any, where: str = "checkpoint") -> Any:
    """The same value in tensors and plain Python only, as the weights-only unpickler reads them.

    numpy scalars become numbers, arrays tensors, paths strings, deques lists, mappings dicts.

    Raises:
        TypeError: the value has another type; the message says where it stands.
    """
    if isinstance(value, torch.Tensor):
        # A parameter would come back as one, and a subclass may not come back at all.
        return value.detach().as_subclass(torch.Tensor)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(value.copy())
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        result = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in value.items():
            result[as_plain(key, where)] = as_plain(item, f"{where}[{key!r}]")
        if hasattr(value, "_metadata"):  # a state_dict's versions of its modules
            result._metadata = as_plain(value._metadata, f"{where}._metadata")
        return result
    if type(value) in (list, tuple, set, deque, torch.Size):
        kind = {deque: list, torch.Size: tuple}.get(type(value), type(value))
        return kind(as_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, (torch.dtype, torch.device)):
        return value
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which cannot be saved: a checkpoint holds "
        f"tensors and plain Python values only. Convert it in the state_dict() it comes from."
    )
