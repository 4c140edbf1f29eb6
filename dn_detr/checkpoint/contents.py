"""What a weight file has to hold to be of use."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dn_detr.checkpoint.formats import without_ddp_prefix
from dn_detr.checkpoint.reading import CheckpointError
from dn_detr.checkpoint.writing import FORMAT_VERSION

AVERAGED = "ema"  # under this key a checkpoint holds the averaged weights, again under "model"


def own_metadata(checkpoint: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """What a checkpoint of this project says of itself (`build_metadata`); {} for others.

    Raises:
        CheckpointError: a later version of this project wrote it.
    """
    metadata = checkpoint.get("metadata")
    if not isinstance(metadata, Mapping) or "format_version" not in metadata:
        return {}
    if metadata["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"Checkpoint {path} has format version {metadata['format_version']}, this dn_detr "
            f"reads up to {FORMAT_VERSION}: upgrade dn_detr."
        )
    return metadata


def as_tensors(model: Any, path: str) -> dict[str, Tensor]:
    """The entries of a state_dict, as tensors, and without the prefix of a DDP model.

    Raises:
        CheckpointError: something else is among them, or a number that is not finite; the first
            is named.
    """
    if not isinstance(model, Mapping):
        raise CheckpointError(f"Checkpoint {path}: its model is a {type(model).__name__}, no dict.")
    tensors = {}
    for name, value in without_ddp_prefix(model).items():
        if not isinstance(value, (Tensor, np.ndarray, np.generic)):
            raise CheckpointError(
                f"Checkpoint {path}: the entry {name!r} is a {type(value).__name__}, not a tensor. "
                f'A checkpoint is a dict of tensors, or has one under "model".'
            )
        tensors[name] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
            raise CheckpointError(
                f"Checkpoint {path}: {name} holds numbers that are not finite. The training that "
                f"wrote it has diverged; use an earlier checkpoint."
            )
    return tensors
