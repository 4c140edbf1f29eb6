"""What a format is: rules from its names to those here, and what else sets it apart."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dn_detr.checkpoint.reading import CheckpointError

Rules = tuple[tuple[str, str], ...]
Shape = tuple[int | None, ...] | None  # None in it: any number; None itself: any shape


@dataclass(frozen=True)
class Adjustment:
    """A change of a tensor that goes beyond its name.

    Attributes:
        names: regular expression of the tensors' names here.
        change: published tensor -> tensor here.
        text: what is done and why, for the converter's table.
    """

    names: str
    change: Callable[[Tensor], Tensor]
    text: str


@dataclass(frozen=True)
class Format:
    """A family of published checkpoints.

    Attributes:
        title: for messages.
        model: first part of the names of the config files that fit, in front of the backbone.
        required: names that every such checkpoint has, each with its shape.
        rules: from its names to those of this project.
        tied: from the second name of a tensor to its first, where a tensor has several.
        absent: names that no such checkpoint has.
        adjustments: of renamed tensors.
        without_effect: arguments that the published script takes, and saves, but this model does
            not look at.
    """

    title: str
    model: str
    required: Mapping[str, Shape]
    rules: Rules
    tied: Rules
    absent: tuple[str, ...] = ()
    adjustments: tuple[Adjustment, ...] = ()
    without_effect: frozenset[str] = frozenset()

    def matches(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a checkpoint with these names and shapes is of this format."""
        return shapes.keys().isdisjoint(self.absent) and all(
            name in shapes and _fits(shapes[name], shape) for name, shape in self.required.items()
        )


def any_shape(*names: str) -> dict[str, Shape]:
    """These names for `Format.required`, whatever their shapes."""
    return dict.fromkeys(names)


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    return wanted is None or (
        len(shape) == len(wanted) and all(w in (None, n) for n, w in zip(shape, wanted))
    )


def without_ddp_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of the model inside DistributedDataParallel, whose names all start so."""
    prefix = "module."
    if state and all(name.startswith(prefix) for name in state):
        return {name[len(prefix) :]: value for name, value in state.items()}
    return dict(state)


def resolve_ties(state: Mapping[str, Tensor], tied: Rules) -> tuple[dict[str, Tensor], list[str]]:
    """Every tensor under its first name only, and the other names, which were dropped.

    Args:
        state: with some tensors under several names.
        tied: `Format.tied`; what a rule gives can be a second name itself.

    Raises:
        CheckpointError: the tensors under the names of one differ.
    """
    resolved: dict[str, Tensor] = {}
    seen: dict[str, str] = {}
    dropped = []
    for alias, value in state.items():
        name = first_name(alias, tied)
        if name != alias:
            dropped.append(alias)
        if name in resolved and not value.equal(resolved[name]):
            raise CheckpointError(
                f"{alias} and {seen[name]} are one tensor in the published models, but differ in "
                f"this file: it comes from another model (or from modified code) and is not "
                f"converted."
            )
        resolved.setdefault(name, value)
        seen.setdefault(name, alias)
    return resolved, dropped


def first_name(name: str, tied: Rules) -> str:
    """The name under which a tensor is kept."""
    while (earlier := _first_match(tied, name)) is not None:
        name = earlier
    return name


def rename(names: Collection[str], rules: Rules) -> tuple[dict[str, str], list[str]]:
    """This project's name -> the name of the file, and the names that no rule knows.

    Raises:
        CheckpointError: two names of the file become one.
    """
    sources: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        target = _first_match(rules, name)
        if target is None:
            unknown.append(name)
        elif target in sources:
            raise CheckpointError(f"{sources[target]} and {name} both stand for {target}.")
        else:
            sources[target] = name
    return sources, unknown


def sample(names: Iterable[str], limit: int = 5) -> str:
    """Some of the names, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (", ..." if len(ordered) > limit else "")


def _first_match(rules: Rules, name: str) -> str | None:
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None
