"""Turns the state_dict of a published checkpoint into one of this project."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dn_detr.checkpoint.class_rows import count_classes, take_rows
from dn_detr.checkpoint.coco import COCO_CATEGORIES, NUM_PUBLISHED_CLASSES
from dn_detr.checkpoint.formats import (
    FORMATS,
    IGNORED,
    Format,
    describe_relative,
    detect_format,
    rename,
    resolve_ties,
    sample,
    without_ddp_prefix,
)
from dn_detr.checkpoint.reading import CheckpointError

_LISTED = 20


class OtherModelError(CheckpointError):
    """The weights are those of another model than the config describes."""


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
        adjusted: what was done to tensors beyond renaming them.
    """

    state: dict[str, Tensor]
    format: str
    source_entries: int
    tied: list[str]
    ignored: list[str]
    classes: str
    adjusted: list[str]


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
        raise CheckpointError(unknown_format(published))
    known = FORMATS[kind]
    ignored = [name for name in published if re.fullmatch(IGNORED, name) and name not in own]
    single, tied = resolve_ties(
        {k: v for k, v in published.items() if k not in ignored}, known.tied
    )
    sources, unknown = rename(single, known.rules)
    state, adjusted = _adjust({name: single[old] for name, old in sources.items()}, known)
    state, classes = _pick_classes(state, own)
    left = [*unknown, *(sources[name] for name in state if name not in own)]
    _check_complete(state, own, left, known)
    return Conversion(state, kind, len(published), tied, ignored, classes, adjusted)


def unknown_format(state: Mapping[str, Tensor]) -> str:
    """What to say of a state_dict that `detect_format` does not know."""
    known = ", ".join(known.title for known in FORMATS.values())
    guess = describe_relative(state)
    return (
        f"the names and shapes of its {len(state)} entries are of none of the formats known here "
        f"({known})." + (f" It looks like {guess}." if guess else f" It has: {sample(state)}.")
    )


def _adjust(state: Mapping[str, Tensor], known: Format) -> tuple[dict[str, Tensor], list[str]]:
    adjusted, done = dict(state), []
    for adjustment in known.adjustments:
        for name in state:
            if re.fullmatch(adjustment.names, name):
                adjusted[name] = adjustment.change(state[name])
        done.append(adjustment.text)
    return adjusted, done


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
        raise OtherModelError(
            f"the {known.title} weights do not fit the model.\n"
            f"  missing, by the names here: {len(missing)} ({sample(missing, _LISTED)})\n"
            f"  left over, by the names in the file: {len(left)} ({sample(left, _LISTED)})\n"
            f"  of another shape: {len(reshaped)} ({sample(reshaped, _LISTED)})"
        )
