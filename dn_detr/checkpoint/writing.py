"""Writes checkpoints: plain data only, and whole or not at all."""

import contextlib
import errno
import json
import os
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np
import torch

from dn_detr.checkpoint.reading import find_damage

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

    The file is written under another name in the same folder, forced to the disk, read back,
    and renamed. Reading 200 MB back takes 0.1 s.
    What a killed process leaves behind does not end in ".pth", and the next save replaces it.

    Raises:
        TypeError: `data` holds something that only a free unpickler could read back.
        OSError: the disk is full, the folder cannot be written, or what was written is not what
            is read back.
    """
    plain = as_plain(data)
    with _replacing(Path(path)) as temporary:
        with _synced(temporary.open("wb")) as file:
            _torch_save(plain, file)
        damage = find_damage(temporary)
        if damage:
            raise OSError(errno.EIO, f"what was written reads back damaged: {damage}", str(path))


def save_weights(
    model: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], path: str | Path
) -> None:
    """Writes a model without the training that made it, as `save_atomically` does.

    Args:
        model: state_dict.
        metadata: of `build_metadata`.
        path: `.safetensors`, which holds the metadata as JSON; any other suffix: as `torch.save`.

    Raises:
        OSError: see `save_atomically`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        save_atomically({"model": model, "metadata": metadata}, path)
        return
    from safetensors.torch import load_file, save

    # Copies: the format holds no tensor that is part of another.
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in model.items()
    }
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    with _replacing(path) as temporary:
        with _synced(temporary.open("wb")) as file:
            file.write(save(tensors, metadata=texts))
        written = load_file(temporary)
        if not all(_same_bytes(written[name], value) for name, value in tensors.items()):
            raise OSError(errno.EIO, "what was written reads back differently", str(path))


def write_text_atomically(text: str, path: str | Path) -> None:
    """As `save_atomically`, for a small text."""
    with _replacing(Path(path)) as temporary:
        with _synced(temporary.open("w", encoding="utf-8")) as file:
            file.write(text)


def remove_leftovers(folder: str | Path) -> None:
    """Removes what a process that was killed while it saved has left; best effort."""
    for path in Path(folder).glob(_temporary("model_*.pth")):
        with contextlib.suppress(OSError):
            path.unlink()


def _temporary(name: str) -> str:
    return f".{name}.tmp"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields the name of a file to write; that file becomes `path` unless there is an error."""
    temporary = path.with_name(_temporary(path.name))
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def _synced(opened: IO[Any]) -> Iterator[IO[Any]]:
    """Forces what is written to the disk before the file is closed."""
    with opened as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether nothing differs, NaN included."""
    as_bytes = [tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def _torch_save(data: Any, file: IO[bytes]) -> None:
    """`torch.save`, whose own writer turns some errors of the disk into a RuntimeError."""
    try:
        torch.save(data, file)
    except RuntimeError as error:
        cause = error.__context__
        if isinstance(cause, OSError):
            raise cause from None
        raise


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
