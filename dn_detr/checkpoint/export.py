"""Weights of a training, without the training: smaller, and to be handed on."""

from collections.abc import Mapping
from pathlib import Path

from dn_detr.checkpoint.contents import AVERAGED, as_tensors, own_metadata
from dn_detr.checkpoint.reading import CheckpointError, read_checkpoint
from dn_detr.checkpoint.writing import save_weights


def export_weights(source: str, output: str, averaged: bool = False) -> str:
    """Writes the weights of a checkpoint of this project, and its metadata, to a file of their own.

    Args:
        source: `.pth` of a training, or a file that was exported or converted.
        output: file to write, `.safetensors` or `.pth`; its folder is made.
        averaged: the weights averaged over the training (`train.ema`), not those of the last step.

    Returns:
        a table of what was written.

    Raises:
        CheckpointError: the file cannot be read, is none of this project, or lacks these weights.
        OSError: the output cannot be written. A file that was there before is intact then.
    """
    refuse_same_file(source, output)
    checkpoint = read_checkpoint(source)
    metadata = own_metadata(checkpoint, source) if isinstance(checkpoint, Mapping) else {}
    if not metadata:
        raise CheckpointError(
            f"{source} is no checkpoint of this project. To convert a published one, name the "
            f"config of the model: --config-file FILE"
        )
    if averaged and AVERAGED not in checkpoint:
        raise CheckpointError(
            f"{source} holds no averaged weights: they are those of a training with "
            f"train.ema.enabled=True. Leave out --averaged for those of the last step."
        )
    part = checkpoint[AVERAGED] if averaged else checkpoint
    state = as_tensors(part.get("model"), source)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    save_weights(state, metadata, output)
    numbers = sum(value.numel() for value in state.values())
    rows = {
        "source": source,
        "weights": "averaged over the training" if averaged else "of the last step",
        "entries": f"{len(state)}, with {numbers:,} numbers",
        "output": f"{output} ({Path(output).stat().st_size / 1e6:.1f} MB)",
    }
    return "\n".join(f"{key:<11} {value}" for key, value in rows.items())


def refuse_same_file(source: str, output: str) -> None:
    """Raises CheckpointError where the output would replace what it is made from."""
    if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
        raise CheckpointError(f"OUTPUT {output} is the source file itself; name another one.")
