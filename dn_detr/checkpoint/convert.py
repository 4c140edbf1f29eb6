"""Turns published checkpoints of the DN-DETR family into this project's.

1. The file is read as data (`reading`) and recognised by its names and shapes (`formats`).
2. Its kinds of parameters, and the arguments it was trained with (`arguments`), are compared with
   the model of the config.
3. Every name is mapped, ties are checked, class rows are picked; nothing may be missing or left.
4. The result is written, read back and loaded strictly. Only then does the file stay.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dn_detr.checkpoint.arguments import saved_arguments
from dn_detr.checkpoint.class_rows import count_classes
from dn_detr.checkpoint.coco import COCO_CATEGORIES, NUM_PUBLISHED_CLASSES
from dn_detr.checkpoint.export import refuse_same_file
from dn_detr.checkpoint.fitting import check_same_model, find_remedy
from dn_detr.checkpoint.formats import FORMATS, detect_format, sample, without_ddp_prefix
from dn_detr.checkpoint.reading import CheckpointError, read_checkpoint
from dn_detr.checkpoint.state_dicts import (
    Conversion,
    OtherModelError,
    convert_state_dict,
    unknown_format,
)
from dn_detr.checkpoint.writing import build_metadata, save_weights
from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import LazyConfig, instantiate  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from dn_detr.checkpoint.checkpointer import DNCheckpointer  # noqa: E402

__all__ = ["convert_file"]


def convert_file(source: str, output: str, cfg: DictConfig, config_file: str) -> str:
    """Converts a published checkpoint, and verifies the result by loading it.

    Args:
        source: what the authors (or detrex) publish.
        output: file to write, `.safetensors` or `.pth`; its folder is made.
        cfg: the config of the model; its `model.num_classes` null means COCO's 80.
        config_file: where `cfg` comes from, for messages.

    Returns:
        a table of what was done, with the warnings at its end.

    Raises:
        CheckpointError: the file cannot be read, is of no known format, or is not what the config
            describes. Nothing is left at `output` then that was not there before.
    """
    refuse_same_file(source, output)
    checkpoint = _as_dict(read_checkpoint(source), source)
    published = without_ddp_prefix(checkpoint["model"])
    kind = detect_format(published)
    if kind is None:
        raise CheckpointError(f"{source}: {unknown_format(published)}")
    if cfg.model.num_classes is None:
        cfg.model.num_classes = len(COCO_CATEGORIES)
    model = instantiate(cfg.model)
    conversion, compared = _convert(checkpoint, published, kind, model, config_file, source)
    warnings = _warnings(checkpoint, published, kind)
    categories = _categories(conversion.state)
    if not categories:
        warnings.append("the classes are not COCO's, so the output does not name them")
    metadata = build_metadata(_config_text(cfg), categories)
    _write_verified(conversion.state, metadata, output, model)
    return _table(source, output, conversion, compared, warnings)


def _convert(
    checkpoint: Mapping[str, Any],
    published: Mapping[str, Tensor],
    kind: str,
    model: nn.Module,
    config_file: str,
    source: str,
) -> tuple[Conversion, list[str]]:
    """The converted weights, and the names of the arguments that agree with the model."""
    arguments = _arguments(checkpoint, published, kind)
    try:
        compared = check_same_model(published, arguments, model, FORMATS[kind])
        return convert_state_dict(published, model.state_dict()), compared
    except CheckpointError as error:
        text = f"{source} -> {config_file}: {error}"
        if isinstance(error, OtherModelError):
            remedy = find_remedy(
                published, arguments, FORMATS[kind], model.num_classes, config_file
            )
            text += f"\n{remedy}"
        raise CheckpointError(text) from error


def _as_dict(data: Any, source: str) -> dict[str, Any]:
    checkpoint = data if isinstance(data, Mapping) else {}
    model = checkpoint.get("model", checkpoint)
    if not isinstance(model, Mapping) or not all(isinstance(v, Tensor) for v in model.values()):
        keys = sample(map(str, checkpoint)) or type(data).__name__
        raise CheckpointError(
            f'{source} holds no dict of tensors, neither itself nor under "model"; it holds: {keys}'
        )
    if "metadata" in checkpoint and any(name.startswith("queries.") for name in model):
        raise CheckpointError(
            f"{source} is a checkpoint of this project already. To write its weights without the "
            f"training, leave out --config-file."
        )
    return {**checkpoint, "model": model} if "model" in checkpoint else {"model": model}


def _arguments(
    checkpoint: Mapping[str, Any], published: Mapping[str, Tensor], kind: str
) -> dict[str, Any] | None:
    """The arguments that the file holds, or that its names give away."""
    saved = saved_arguments(checkpoint)
    if saved is None and kind.startswith("detrex") and _has_torchvision_names(published):
        deep = any(".layer3.22." in name for name in published)
        return {
            "backbone": "resnet101" if deep else "resnet50",
            "dilation": True,
            "num_patterns": len(published.get("transformer.patterns.weight", ())),
        }
    return saved


def _has_torchvision_names(published: Mapping[str, Tensor]) -> bool:
    """Whether a detrex model is a DC5 one: detrex takes torchvision's backbone for these only."""
    return any(name.startswith("backbone.body.") for name in published)


def _warnings(
    checkpoint: Mapping[str, Any], published: Mapping[str, Tensor], kind: str
) -> list[str]:
    """What the file does not tell, and what of it is left out."""
    warnings = []
    arguments = saved_arguments(checkpoint)
    single_level = "input_proj.weight" in published
    if arguments is None:
        temperatures = " (published: 20, DAB-DETR-DC5 in detrex: 10)" if single_level else ""
        warnings.append(
            f"the file does not say with which arguments it was trained; check that the config has "
            f"the same position temperature{temperatures} and number of heads"
        )
        if single_level and not (kind.startswith("detrex") and _has_torchvision_names(published)):
            warnings.append(_DC5_UNKNOWN)
        if kind == "dn_deformable_detr":
            warnings.append(f"its names are also those of {_ONE_STAGE_DINO}")
    elif kind == "dn_deformable_detr" and arguments.get("modelname") == _DINO_PORT:
        warnings.append(f"this is {_ONE_STAGE_DINO}")
    averaged = [key for key in ("ema_model", "ema_state") if key in checkpoint]
    if averaged:
        warnings.append(f'the averaged weights, "{averaged[0]}" in the file, are left out')
    return warnings


_DC5_UNKNOWN = (
    "DC5 weights cannot be told from C5 weights by their names or shapes: should the AP be far too "
    "low, try the config with (or without) dc5"
)
_DINO_PORT = "dn_dab_dino_deformable_detr"
_ONE_STAGE_DINO = (
    "the DN-DETR repository's DINO without --two_stage, which evaluates as DN-Deformable-DETR, but "
    "was trained with contrastive denoising and look forward twice"
)


def _categories(state: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    coco = count_classes(state) in (len(COCO_CATEGORIES), NUM_PUBLISHED_CLASSES)
    return list(COCO_CATEGORIES) if coco else []


def _config_text(cfg: DictConfig) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        LazyConfig.save(cfg, path)
        return Path(path).read_text(encoding="utf-8")


def _write_verified(
    state: Mapping[str, Tensor], metadata: dict[str, Any], output: str, model: nn.Module
) -> None:
    """Writes beside `output`, loads that strictly, and gives it its name if all is well."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".safetensors" if path.suffix == ".safetensors" else ".pth"
    trial = path.with_name(f".{path.stem}.unverified{suffix}")
    try:
        save_weights(state, metadata, trial)
        categories = metadata["categories"]
        DNCheckpointer(model).load_weights(str(trial), categories=categories, strict=True)
        loaded = model.state_dict()
        if not all(loaded[name].equal(value) for name, value in state.items()):
            raise CheckpointError(f"{output}: the model does not hold the converted weights.")
        os.replace(trial, path)
    finally:
        trial.unlink(missing_ok=True)


def _table(
    source: str, output: str, done: Conversion, compared: list[str], warnings: list[str]
) -> str:
    agree = f"agree with the config: {', '.join(compared)}"
    rows = {
        "source": f"{source} ({FORMATS[done.format].title})",
        "entries": f"{done.source_entries} read, {len(done.state)} written, {len(done.tied)} tied "
        f"and {len(done.ignored)} without use dropped; nothing missing, nothing left over",
        "class rows": done.classes,
        **({"adjusted": "; ".join(done.adjusted)} if done.adjusted else {}),
        "arguments": agree if compared else "none to compare",
        "output": f"{output} (verified: loads into the model)",
    }
    lines = [f"{key:<11} {value}" for key, value in rows.items()]
    return "\n".join([*lines, *(f"WARNING: {warning}" for warning in warnings)])
