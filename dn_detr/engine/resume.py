"""What is said of a training that goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import yaml

logger = logging.getLogger(__name__)

# What is learnt does not depend on them: where files lie, and who writes how often.
_SILENT = (
    "train.output_dir",
    "train.overwrite",
    "train.init_checkpoint",
    "train.log_period",
    "train.eval_period",
    "train.checkpointer.period",
    "train.checkpointer.max_to_keep",
    "train.dist_timeout",
    "dataloader.train.num_workers",
    "dataloader.test.num_workers",
)
_MISSING = object()


def tell_changes(saved: str, present: str) -> list[str]:
    """Warns of every value that differs from the config that a checkpoint was saved with.

    The present config counts: its length, schedule, learning rates and data.

    Args:
        saved, present: configs as YAML, as a checkpoint's metadata hold them.

    Returns:
        the lines of the warning, one a value.
    """
    try:
        old, new = (dict(_flat(yaml.safe_load(text) or {})) for text in (saved, present))
    except yaml.YAMLError:  # it holds Python objects, which are not made from a file
        logger.warning("The config of the checkpoint cannot be compared with the present one.")
        return []
    lines = [
        f"{key}: {_shown(old.get(key, _MISSING))} -> {_shown(new.get(key, _MISSING))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _MISSING) != new.get(key, _MISSING) and key not in _SILENT
    ]
    if lines:
        listing = "\n  ".join(lines)
        logger.warning(
            "The training goes on with another config than it was stopped with, so it will not "
            "end as without the stop:\n  %s%s",
            listing,
            "\nThe schedule is a share of train.max_iter: learning rates follow the new length."
            if any(line.startswith(("train.max_iter:", "lr_multiplier")) for line in lines)
            else "",
        )
    return lines


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        key = f"{prefix}{name}"
        if isinstance(value, (dict, list)) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _shown(value: Any) -> str:
    return "(not there)" if value is _MISSING else str(value)
