"""Turns published DN-DETR and DAB-DETR checkpoints into this project's.

1. The file is read as data (`reading`) and recognised by its names and shapes (`formats`).
2. The arguments it was trained with are compared with the model of the config (`arguments`).
3. Every name is mapped, ties are checked, class rows are picked; nothing may be missing or left.
4. The result is written, read back and loaded strictly. Only then does the file stay.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dn_detr.checkpoint.arguments import check_arguments, saved_arguments
from dn_detr.checkpoint.class_rows import count_classes, take_rows
from dn_detr.checkpoint.coco import COCO_CATEGORIES, NUM_PUBLISHED_CLASSES
from dn_detr.checkpoint.formats import (
    FORMATS,
    IGNORED,
    Format,
    detect_format,
    rename,
    resolve_ties,
    sample,
    without_ddp_prefix,
)
from dn_detr.checkpoint.reading import CheckpointError, read_checkpoint
from dn_detr.checkpoint.writing import build_metadata, save_atomically
from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import LazyConfig, instantiate  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from dn_detr.checkpoint.checkpointer import DNCheckpointer  # noqa: E402

_LISTED = 20


@dataclass(frozen=True)
class Conversion:
    """A converted state_dict, and what was done to get it.

    Attributes:
        state: under this project's names, each with the shape that the model has.
        format: key in `FORMATS`.
        source_entries: number of entries in the published state_dict.
        tied: entries dropped because their tensor stands under another name, too.
        ignored: entries dropped because the model has nothing like them, and needs nothing.
        classes: what became of the class rows.
    """

    state: dict[str, Tensor]
    format: str
    source_entries: int
    tied: list[str]
    ignored: list[str]
    classes: str


def convert_file(source: str, output: str, cfg: DictConfig, config_file: str) -> str:
    """Converts a published checkpoint, and verifies the result by loading it.

    Args:
        source: what the authors (or detrex) publish.
        output: file to write; its folder is made.
        cfg: the config of the model; its `model.num_classes` null means COCO's 80.
        config_file: where `cfg` comes from, for messages.

    Returns:
        a table of what was done, with the warnings at its end.

    Raises:
        CheckpointError: the file cannot be read, is of no known format, or is not what the config
            describes. Nothing is left at `output` then that was not there before.
    """
    if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
        raise CheckpointError(f"OUTPUT {output} is the source file itself; name another one.")
    checkpoint = _as_dict(read_checkpoint(source), source)
    published = without_ddp_prefix(checkpoint["model"])
    kind = detect_format(published)
    if kind is None:
        raise CheckpointError(f"{source}: {_unknown_format(published)}")
    if cfg.model.num_classes is None:
        cfg.model.num_classes = len(COCO_CATEGORIES)
    model = instantiate(cfg.model)
    compared, warnings = _compare(checkpoint, published, FORMATS[kind], kind, model, config_file)
    try:
        conversion = convert_state_dict(published, model.state_dict())
    except CheckpointError as error:
        raise CheckpointError(f"{source} -> {config_file}: {error}") from error
    categories = _categories(conversion.state)
    if not categories:
        warnings.append("the classes are not COCO's, so the output does not name them")
    metadata = build_metadata(_config_text(cfg), categories)
    _write_verified({"model": conversion.state, "metadata": metadata}, output, model, categories)
    return _table(source, output, conversion, compared, warnings)


def convert_state_dict(published: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Conversion:
    """Renames a published state_dict, drops second names, and picks the class rows.

    Args:
        published: the authors' or detrex's.
        own: state_dict of the model it is for.

    Raises:
        CheckpointError: the format is unknown, or not everything fits; all names are listed.
    """
    published = without_ddp_prefix(published)
    kind = detect_format(published)
    if kind is None:
        raise CheckpointError(_unknown_format(published))
    ignored = [name for name in published if re.fullmatch(IGNORED, name) and name not in own]
    single, tied = resolve_ties({k: v for k, v in published.items() if k not in ignored})
    sources, unknown = rename(single, FORMATS[kind].rules)
    state, classes = _pick_classes({name: single[old] for name, old in sources.items()}, own)
    left = [*unknown, *(sources[name] for name in state if name not in own)]
    _check_complete(state, own, left, FORMATS[kind])
    return Conversion(state, kind, len(published), tied, ignored, classes)


def _as_dict(data: Any, source: str) -> dict[str, Any]:
    checkpoint = data if isinstance(data, Mapping) else {}
    model = checkpoint.get("model", checkpoint)
    if not isinstance(model, Mapping) or not all(isinstance(v, Tensor) for v in model.values()):
        keys = sample(map(str, checkpoint)) or type(data).__name__
        raise CheckpointError(
            f'{source} holds no dict of tensors, neither itself nor under "model"; it holds: {keys}'
        )
    if "metadata" in checkpoint and "queries.anchors" in model:
        raise CheckpointError(f"{source} is a checkpoint of this project already.")
    return {**checkpoint, "model": model} if "model" in checkpoint else {"model": model}


def _unknown_format(state: Mapping[str, Tensor]) -> str:
    known = ", ".join(known.title for known in FORMATS.values())
    relatives = {
        "transformer.level_embed": "a deformable model (several feature levels)",
        "transformer.level_embeds": "a deformable model (several feature levels)",
        "query_embed.weight": "DETR, Conditional DETR or the like (queries without anchors)",
    }
    guess = next((text for name, text in relatives.items() if name in state), None)
    return (
        f"the names and shapes of its {len(state)} entries are of none of the formats known here "
        f"({known})." + (f" It looks like {guess}." if guess else f" It has: {sample(state)}.")
    )


def _compare(
    checkpoint: Mapping[str, Any],
    published: Mapping[str, Tensor],
    known: Format,
    kind: str,
    model: nn.Module,
    config_file: str,
) -> tuple[list[str], list[str]]:
    """The names of the arguments that agree with the model, and warnings of what cannot be told."""
    labels = "queries.label_embed.weight" in model.state_dict()
    if labels != (known.model == "dn_detr"):
        raise CheckpointError(
            f"This is an {known.title} checkpoint, and the model of {config_file} "
            f"{'has' if labels else 'lacks'} the label embedding that sets DN-DETR apart from "
            f"DAB-DETR. Use a config {known.model}_*."
        )
    arguments = saved_arguments(checkpoint)
    if arguments is not None:
        return check_arguments(arguments, model, known.model, config_file), []
    if kind.startswith("detrex") and any(name.startswith("backbone.body.") for name in published):
        # detrex takes torchvision's backbone, with these names, for its DC5 models only.
        seen = {
            "backbone": _depth(published),
            "dilation": True,
            "num_patterns": len(published.get("transformer.patterns.weight", ())),
        }
        return check_arguments(seen, model, known.model, config_file), [_NO_ARGUMENTS]
    return [], [_NO_ARGUMENTS, _DC5_UNKNOWN]


_NO_ARGUMENTS = (
    "the file does not say with which arguments it was trained; check that the config has the same "
    "position temperature (published: 20, DAB-DETR-DC5 in detrex: 10) and number of heads"
)
_DC5_UNKNOWN = (
    "DC5 weights cannot be told from C5 weights by their names or shapes: should the AP be far too "
    "low, try the config with (or without) dc5"
)


def _depth(published: Mapping[str, Tensor]) -> str:
    return "resnet101" if any(".layer3.22." in name for name in published) else "resnet50"


def _pick_classes(
    state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    theirs, ours = count_classes(state), count_classes(own)
    if theirs == ours:
        return state, f"all {ours} kept"
    if theirs == NUM_PUBLISHED_CLASSES and ours == len(COCO_CATEGORIES):
        rows = [category["id"] for category in COCO_CATEGORIES]
        return take_rows(state, rows), f"{ours} of {theirs}, by COCO's category ids"
    raise CheckpointError(
        f"the file has {theirs} classes, the model {ours}. Set model.num_classes={theirs}"
        + (f", or {len(COCO_CATEGORIES)}." if theirs == NUM_PUBLISHED_CLASSES else ".")
    )


def _check_complete(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], left: list[str], known: Format
) -> None:
    missing = [name for name in own if name not in state]
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or left or reshaped:
        raise CheckpointError(
            f"the {known.title} checkpoint does not fit the model.\n"
            f"  missing, by the names here: {len(missing)} ({sample(missing, _LISTED)})\n"
            f"  left over, by the names in the file: {len(left)} ({sample(left, _LISTED)})\n"
            f"  of another shape: {len(reshaped)} ({sample(reshaped, _LISTED)})\n"
            f"Choose the config by backbone, patterns and model, or the file is incomplete."
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
    data: dict[str, Any], output: str, model: nn.Module, categories: list[dict[str, Any]]
) -> None:
    """Writes beside `output`, loads that strictly, and gives it its name if all is well."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    trial = path.with_name(f".{path.stem}.unverified.pth")
    try:
        save_atomically(data, trial)
        DNCheckpointer(model).load_weights(str(trial), categories=categories, strict=True)
        loaded = model.state_dict()
        if not all(loaded[name].equal(value) for name, value in data["model"].items()):
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
        "arguments": agree if compared else "none to compare",
        "output": f"{output} (verified: loads into the model)",
    }
    lines = [f"{key:<11} {value}" for key, value in rows.items()]
    return "\n".join([*lines, *(f"WARNING: {warning}" for warning in warnings)])
