"""What ends a training, told so that a user can act on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dn_detr.checkpoint.writing import save_atomically
from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.structures import Boxes, Instances  # noqa: E402

SHOWN = 10  # images named in a message

_LESS_MEMORY = (
    "(1) a smaller dataloader.train.total_batch_size, with train.accumulate times as many; "
    "(2) model.encoder.activation_checkpointing=True, and of model.decoder and model.backbone, or "
    "train.amp.enabled=True; "
    "(3) smaller images, see dataloader.train.mapper.augmentations"
)

Batch = Sequence[Mapping[str, Any]]


class LocalError(RuntimeError):
    """An error of one process, which tells it; the others are ended."""


class NonFiniteError(FloatingPointError):
    """A loss or a gradient that is not finite; raised in every process alike."""


def message_of(error: Exception) -> str:
    """The message; of what a loader's worker raised, without the traceback torch puts in front."""
    text = str(error).rstrip()
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1] if text.startswith("Caught ") else text


def name_images(batch: Batch) -> str:
    """The images of a batch by id and file."""
    names = [f"{x.get('image_id', '?')} ({x.get('file_name', 'no file')})" for x in batch]
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def dump_batch(batch: Batch, path: Path) -> str:
    """Writes a batch as plain data, for `torch.load(path, weights_only=True)`.

    Returns:
        where it lies, or why it could not be written, as part of a sentence.
    """
    try:
        save_atomically({"batch": [_plain(sample) for sample in batch]}, path)
    except (OSError, TypeError) as error:
        return f"which could not be written to {path}: {error}"
    return f"written to {path}"


def _plain(value: Any) -> Any:
    if isinstance(value, Instances):
        fields = {name: _plain(field) for name, field in value.get_fields().items()}
        return {"image_size": tuple(value.image_size), **fields}
    if isinstance(value, Boxes):
        return value.tensor
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return value


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator or the CPU had no memory left."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain_out_of_memory(error: RuntimeError, batch: Batch) -> str:
    """What was in the batch, and what takes less."""
    sizes = [tuple(sample["image"].shape[-2:]) for sample in batch]
    largest = max(range(len(batch)), key=lambda i: sizes[i][0] * sizes[i][1])
    objects = [len(sample["instances"]) for sample in batch if "instances" in sample]
    height, width = sizes[largest]
    reason = str(error).strip().splitlines()[0]
    return (
        f"out of memory with {len(batch)} images in the batch of this process; the largest is "
        f"{width}x{height} pixels as the model gets it: {name_images([batch[largest]])}; "
        f"objects in an image: at most {max(objects, default=0)}. What takes less: "
        f"{_LESS_MEMORY}. ({reason})"
    )


def explain(error: RuntimeError) -> str | None:
    """What a RuntimeError of torch means here; None for one that is not known."""
    text = str(error).strip()
    if is_out_of_memory(error):
        return f"out of memory. What takes less: {_LESS_MEMORY}. ({text.splitlines()[0]})"
    if text.startswith("DataLoader worker") or "worker (pid" in text:
        return (
            f"a process that loads data was ended from outside: {text.splitlines()[0]} Often the "
            f"machine had no memory left (see dmesg; in a container also the size of /dev/shm). "
            f"Take fewer: dataloader.train.num_workers=N, dataloader.test.num_workers=N "
            f"(0: none but the process itself)."
        )
    if re.search(
        r"Connection (closed by peer|reset)|Timed out (after|waiting)|Socket Timeout", text
    ):
        reason = text.splitlines()[0].split(" This is typically")[0]
        return (
            f"another process ended or did not answer in time (train.dist_timeout, in seconds): "
            f"{reason} What that process says, here or on its own machine, is the cause."
        )
    return None
