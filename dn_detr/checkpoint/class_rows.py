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
    # Of what the encoder proposes; one row where that is objects, of whatever class.
    r"queries\.class_embed\.(weight|bias)": 0,
}


def count_classes(state: Mapping[str, Tensor]) -> int | None:
    """C of a state_dict, by its first pattern that occurs; None without class rows."""
    for pattern, extra in CLASS_ROWS.items():
        for name, value in state.items():
            if re.fullmatch(pattern, name):
                return len(value) - extra
    return None


def _class_rows(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Name of every parameter with C rows for the classes -> rows behind these."""
    count = count_classes(state)
    return {
        name: extra
        for pattern, extra in CLASS_ROWS.items()
        for name, value in state.items()
        if re.fullmatch(pattern, name) and len(value) - extra == count
    }


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
    old_rows = _class_rows(state)
    for name, extra in _class_rows(fresh).items():
        if name not in old_rows or state[name].shape[1:] != fresh[name].shape[1:]:
            continue
        if name.startswith("queries.class_embed") and len(state[name]) == len(fresh[name]) == 1:
            continue
        value = fresh[name].clone()
        for old, new in pairs:
            value[new] = state[name][old]
        if extra:
            value[-extra:] = state[name][-extra:]
        moved[name] = value
    return moved


def take_rows(state: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """`state` with these rows of its classes only, in this order; the rows behind them stay."""
    taken = dict(state)
    for name, extra in _class_rows(state).items():
        behind = range(len(state[name]) - extra, len(state[name]))
        taken[name] = state[name][[*rows, *behind]].clone()
    return taken
