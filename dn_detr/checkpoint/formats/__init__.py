"""The checkpoint formats of others: how to tell them apart, and their names in this project.

A format is a table of rules, from a regular expression of the published name to the name here; the
first rule that matches a whole name counts (`table`). Sources of the names: the state_dicts of
IDEA-Research/DN-DETR (commit ff3902a), IDEA-Research/DAB-DETR, IDEA-Research/DINO and
IDEA-Research/detrex (commit e244e6c).
"""

from collections.abc import Mapping

from torch import Tensor

from dn_detr.checkpoint.formats import deformable, dense, dino
from dn_detr.checkpoint.formats.relatives import describe_relative
from dn_detr.checkpoint.formats.table import (
    Adjustment,
    Format,
    first_name,
    rename,
    resolve_ties,
    sample,
    without_ddp_prefix,
)

__all__ = [
    "FORMATS",
    "IGNORED",
    "Adjustment",
    "Format",
    "describe_relative",
    "detect_format",
    "first_name",
    "rename",
    "resolve_ties",
    "sample",
    "without_ddp_prefix",
]

# No two match the same checkpoint (tests/checkpoint/test_formats.py).
FORMATS: dict[str, Format] = {**dense.FORMATS, **deformable.FORMATS, **dino.FORMATS}

# Counters that frozen batch norms do not have; they change nothing in evaluation.
IGNORED = r".+\.num_batches_tracked"


def detect_format(state: Mapping[str, Tensor]) -> str | None:
    """The key in `FORMATS` of a state_dict without "module." prefixes, told by names and shapes."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return next((key for key, known in FORMATS.items() if known.matches(shapes)), None)
