"""The parameters that have one row per class, and moving those rows to other classes.

C: number of classes of a checkpoint or a model.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

# Pattern of a parameter's name -> number of rows behind the C rows of the classes. The label
# embedding ends in the row "unknown", which belongs to no class and is always kept.
CLASS_ROWS = {
    r"heads\.class_embed(\.\d+)?\.(weight|bias)": 0,
    r"queries\.label_embed\.weight": 1,
}


def extra_rows(name: str) -> int | None:
    """Rows behind those of the classes; None for a parameter without class rows."""
    for pattern, extra in CLASS_ROWS.items():
        if re.fullmatch(pattern, name):
            return extra
    return None


def count_classes(state: Mapping[str, Tensor]) -> int | None:
    """C of a state_dict; None where no parameter has class rows."""
    for name, value in state.items():
        extra = extra_rows(name)
        if extra is not None:
            return len(value) - extra
    return None


def pair_names(old: Sequence[str | None], new: Sequence[str | None]) -> list[tuple[int, int]]:
    """(row in `old`, row in `new`) of every name in both, in the order of `new`.

    Capitals and outer blanks do not count. A name that occurs twice is paired in order of
    occurrence. None stands for a row without a class.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(old):
        if name is not None:
            rows.setdefault(name.strip().casefold(), []).append(row)
    pairs = []
    for row, name in enumerate(new):
        partners = rows.get(name.strip().casefold()) if name is not None else None
        if partners:
            pairs.append((partners.pop(0), row))
    return pairs


def move_rows(
    state: Mapping[str, Tensor], fresh: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    """`state` with its class rows moved to the classes of a model.

    Args:
        state: weights of a checkpoint.
        fresh: state_dict of the freshly initialised model, which gives all other rows.
        pairs: (row in `state`, row in `fresh`) of the classes to keep.
    """
    moved = dict(state)
    for name, start in fresh.items():
        extra = extra_rows(name)
        if extra is None or name not in state or state[name].shape[1:] != start.shape[1:]:
            continue
        value = start.clone()
        for old, new in pairs:
            value[new] = state[name][old]
        if extra:
            value[-extra:] = state[name][-extra:]
        moved[name] = value
    return moved


def take_rows(state: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """`state` with these rows of its classes only, in this order; the rows behind them stay."""
    taken = dict(state)
    for name, value in state.items():
        extra = extra_rows(name)
        if extra is not None:
            behind = range(len(value) - extra, len(value))
            taken[name] = value[[*rows, *behind]].clone()
    return taken
