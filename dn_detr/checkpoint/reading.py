"""Reads weight files of others as data: nothing in a file is run.

`.pth` (and `.pt`, `.pyth`) through torch's weights-only unpickler, `.pkl` of the detectron2 zoo
through an unpickler that knows numpy arrays and plain containers only, `.safetensors` as it is.
"""

import argparse
import collections
import contextlib
import functools
import json
import logging
import pathlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    from numpy._core import multiarray, numeric
except ImportError:  # numpy 1
    from numpy.core import multiarray, numeric

logger = logging.getLogger(__name__)

# Below this version, crafted files have got round weights_only=True
# (CVE-2025-32434 before 2.6, and memory corruption in the unpickler later on).
SAFE_TORCH = (2, 10)
_MAX_LISTED = 10


class CheckpointError(ValueError):
    """A weight file that cannot be used; the message says which, why, and what to do.

    Attributes:
        reason: only why, for a list of several files.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


def read_checkpoint(path: str | Path, mmap: bool = False) -> Any:
    """Reads a local weight file onto the CPU without running anything in it.

    Every record of a `.pth` is compared with the checksum stored beside it, which `torch.load`
    leaves out; for 200 MB that takes 0.1 s. `.pkl` and `.safetensors` have no checksums.

    Args:
        mmap: of a `.pth`: leave the tensors in the file until they are used.

    Returns:
        What the file holds: usually a dict, of tensors or with a dict of tensors under "model".
        `.pkl` gives numpy arrays, as detectron2 expects them; a `.safetensors` of
        `writing.save_weights` gives "model" and "metadata".

    Raises:
        CheckpointError: there is no such file, it is damaged, or it wants to run code.
    """
    path = Path(path)
    _check_present(path)
    if path.suffix == ".pkl":
        return _read_pickle(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _warn_if_unsafe()
    return _read_torch(path, mmap)


def find_damage(path: Path) -> str:
    """Reads a zip archive, as `torch.save` writes one, through; says what is wrong, "" if nothing.

    Raises:
        OSError: the file cannot be opened or read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(record.CRC for record in archive.infolist()):
                return ""  # written without, see torch.serialization.set_crc32_options
            record = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, zlib.error) as error:
        return str(error)
    return f"the checksum of {record} is wrong" if record else ""


def _check_present(path: Path) -> None:
    if path.is_dir():
        text = f"Checkpoint {path} is a folder. {_listing(path)}"
        raise CheckpointError(text, "it is a folder")
    if not path.is_file():
        text = f"Checkpoint {path} does not exist. {_listing(path.parent)}"
        raise CheckpointError(text, "it does not exist")
    with path.open("rb") as file:
        head = file.read(256).lstrip().lower()
    if not head:
        text = f"Checkpoint {path} is empty (0 bytes). Download or save it again."
        raise CheckpointError(text, "it is empty (0 bytes)")
    if head.startswith((b"<!doctype", b"<html")):
        raise CheckpointError(
            f"Checkpoint {path} is a web page, not weights: the download ended at a log-in or "
            f"confirmation page. Download it again in a browser.",
            "it is a web page",
        )


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.pth"))
    if not names:
        return f"No .pth file lies in {folder}."
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"In {folder} there is: {', '.join(names[:_MAX_LISTED])}{more}."


def _torch_version() -> tuple[int, ...]:
    return tuple(int(number) for number in torch.__version__.split(".")[:2])


@functools.cache  # once per process
def _warn_if_unsafe() -> None:
    if _torch_version() < SAFE_TORCH:
        logger.warning(
            "torch %s: loading a .pth from a source that you do not trust is only safe from "
            "torch %d.%d on. Upgrade torch, or load files of your own and .safetensors only.",
            torch.__version__,
            *SAFE_TORCH,
        )


def _read_torch(path: Path, mmap: bool) -> Any:
    try:
        damage = find_damage(path) if zipfile.is_zipfile(path) else ""
        if damage:
            raise zipfile.BadZipFile(damage)
        with _safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises a dozen types for a damaged file
        refused = re.search(r"(?:GLOBAL|unrecognized function|but got) (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise _refused(path, refused.group(1)) from error
        raise _damaged(path, error) from error


def _refused(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"Checkpoint {path} is refused: it refers to {name}, which is neither a tensor nor plain "
        f"data, and loading that could run code. Nothing was run. If you made the file yourself, "
        f"save it again with tensors, numbers, strings, lists and dicts only.",
        f"it refers to {name}, which could run code",
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    reason = reason.split(". In PyTorch 2.6")[0]  # there torch advises to run what is in the file
    size = f"{path.stat().st_size} bytes"
    return CheckpointError(
        f"Checkpoint {path} ({size}) cannot be read: it is truncated, damaged or no checkpoint. "
        f"Download or save it again. ({type(error).__name__}: {reason})",
        f"it is truncated or damaged ({size}; {reason})",
    )


def _plain_globals() -> list[Any]:
    """What published files hold beside tensors: argparse's arguments, numpy scalars, paths."""
    return [
        argparse.Namespace,
        pathlib.PosixPath,
        np.dtype,
        *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
        # numpy 1 and numpy 2 write different names
        (multiarray.scalar, "numpy.core.multiarray.scalar"),
        (multiarray.scalar, "numpy._core.multiarray.scalar"),
    ]


@contextlib.contextmanager
def _safe_globals() -> Iterator[None]:
    """`torch.serialization.safe_globals`, which torch 2.4 lacks."""
    allowed = _plain_globals()
    if _torch_version() < (2, 6):  # knows no pairs of object and name
        allowed = [item for item in allowed if not isinstance(item, tuple)]
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(allowed):
            yield
        return
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What pickle protocol 2 calls for bytes; `_codecs.encode` itself takes any codec."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not latin1")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, strings, numbers and numpy arrays; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("_codecs", "encode"): _encode_latin1,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        for core in ("numpy.core", "numpy._core"):
            known[f"{core}.multiarray", "_reconstruct"] = multiarray._reconstruct
            known[f"{core}.multiarray", "scalar"] = multiarray.scalar
            known[f"{core}.numeric", "_frombuffer"] = numeric._frombuffer
        if (module, name) not in known:
            raise _RefusedGlobal(f"{module}.{name}")
        return known[module, name]


class _RefusedGlobal(pickle.UnpicklingError):
    pass


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            # latin1: files of Python 2, as in detectron2's own loader
            return _ArrayUnpickler(file, encoding="latin1").load()
    except _RefusedGlobal as error:
        raise _refused(path, str(error)) from error
    except Exception as error:  # pickle raises almost any type for a damaged file
        raise _damaged(path, error) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import safe_open
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"Reading {path} needs: pip install safetensors") from error
    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
        tensors = load_file(path)
        if "format_version" not in texts:  # of others
            return tensors
        return {"model": tensors, "metadata": {key: json.loads(texts[key]) for key in texts}}
    except Exception as error:  # safetensors' own exception type is not public
        raise _damaged(path, error) from error
