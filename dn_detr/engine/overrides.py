"""Checked `key=value` overrides of a LazyConfig.

detectron2 applies whatever is written: a misspelt `train.max_iters=5` is stored, and ignored. Here
a key has to exist in the config, or to be a parameter of the `_target_` that stands at its node.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import Any

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.utils.registry import locate  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from hydra.core.override_parser.types import Override  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig, ListConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

# What the values of `train` that may be null are, once they are given.
NULLABLE_TYPES: dict[str, type] = {
    "train.max_iter": int,
    "train.epochs": float,
    "train.eval_period": int,
    "train.checkpointer.period": int,
    "train.checkpointer.max_to_keep": int,
    "train.device": str,
}

# What users of detectron2's yacs configs write, and what it is called here.
YACS_KEYS: dict[str, str] = {
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.MAX_ITER": "train.max_iter",
    "TEST.EVAL_PERIOD": "train.eval_period",
}


class ConfigError(ValueError):
    """A config, an override or a command line that cannot be used; the message says why."""


def apply_overrides(cfg: DictConfig, overrides: list[str]) -> None:
    """Applies overrides to `cfg` in place, in the order given.

    Args:
        cfg: a loaded LazyConfig.
        overrides: hydra's grammar: `a.b=1` for what exists (or what the `_target_` there takes),
            `+a.c=1` for a new key, `a.b=null` to take a part out. A value that is a dict is merged
            key by key, each key checked; a dict with `_target_` replaces the node.

    Raises:
        ConfigError: an override cannot be read, names an unknown key, or has the wrong type.
    """
    for override in _parse(cfg, overrides):
        key, value = override.key_or_group, override.value()
        if override.is_delete():
            raise ConfigError(f"~{key}: keys cannot be deleted; write {key}=null instead.")
        _set(cfg, key, value, new=override.is_add() or override.is_force_add())


def _parse(cfg: DictConfig, overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for position, text in enumerate(overrides):
        if "=" not in text:
            raise ConfigError(_hint_without_equal_sign(cfg, overrides, position))
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            key = text.split("=", 1)[0]
            raise ConfigError(
                f"cannot read the override {text!r}: {reason} "
                f"Put quotes inside quotes round a value with special characters: '{key}=\"...\"'."
            ) from error
        if override.is_sweep_override():
            raise ConfigError(
                f"the override {text!r} lists several values; a list is written "
                f"'{override.key_or_group}=[a,b]', a text with commas '\"a,b\"'."
            )
        parsed.append(override)
    return parsed


def _hint_without_equal_sign(cfg: DictConfig, overrides: list[str], position: int) -> str:
    text = overrides[position]
    if text.startswith("~"):
        return f"{text}: keys cannot be deleted; write {text[1:]}=null instead."
    if text.startswith("-"):
        return f"the option {text} has to stand before the key=value overrides."
    value = overrides[position + 1] if position + 1 < len(overrides) else "VALUE"
    if "=" in value:
        value = "VALUE"
    key = (_suggestions(cfg, text) or [text])[0]
    return f"overrides are written key=value: use {key}={value} instead of {text} {value}."


def _set(cfg: DictConfig, key: str, value: Any, new: bool) -> None:
    if isinstance(value, dict) and "_target_" not in value:
        node = _current(cfg, key)
        if isinstance(node, DictConfig):
            for name, entry in value.items():
                _set(cfg, f"{key}.{name}", entry, new)
            return
    if new:
        _check_parent(cfg, key)
    else:
        _check_key(cfg, key)
        value = _checked_value(cfg, key, value)
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)


def _current(cfg: DictConfig, key: str) -> Any:
    """What stands at a key; None for nothing, and for an interpolation that leads nowhere."""
    try:
        return OmegaConf.select(cfg, key, default=None)
    except OmegaConfBaseException:
        return None


def _check_key(cfg: DictConfig, key: str) -> None:
    """Walks down `key`; refuses the first name that is neither there nor a parameter."""
    node: Any = cfg
    path: list[str] = []
    names = key.split(".")
    for position, name in enumerate(names):
        where = ".".join(path)
        if isinstance(node, ListConfig):
            if not (name.isdigit() and int(name) < len(node)):
                raise ConfigError(f"{key}: {where} is a list of {len(node)}; no entry {name}.")
            node = node[int(name)]
        elif not isinstance(node, DictConfig):
            shown = "null" if node is None else f"the value {node!r}"
            raise ConfigError(f"{key}: {where} is {shown} and has no key {name!r}.")
        elif name in node.keys():
            if position == len(names) - 1:
                return
            node = node[name]
        elif name in _parameters(node) and position == len(names) - 1:
            return
        else:
            raise ConfigError(_unknown_key(cfg, node, key, where, name))
        path.append(name)


def _check_parent(cfg: DictConfig, key: str) -> None:
    """A new key may stand below what is a node or not there yet, never below a value."""
    names = key.split(".")
    for end in range(1, len(names)):
        prefix = ".".join(names[:end])
        node = _current(cfg, prefix)
        if node is not None and not OmegaConf.is_config(node):
            raise ConfigError(f"+{key}: {prefix} is the value {node!r} and takes no keys.")


def _unknown_key(cfg: DictConfig, node: DictConfig, key: str, where: str, name: str) -> str:
    prefix = f"{where}." if where else ""
    valid = sorted({str(k) for k in node if k != "_target_"} | set(_parameters(node)))
    near = [] if key in YACS_KEYS else [prefix + n for n in _closest(name, valid)]
    near = near or _suggestions(cfg, key)
    message = f"unknown key {key}"
    message += f"; did you mean {' or '.join(near)}?" if near else "."
    if valid and len(valid) <= 40:
        message += f" Valid under {where or 'the top'}: {', '.join(valid)}."
    return f"{message} A new key is written +{key}=..."


def _closest(name: str, candidates: list[str], count: int = 3) -> list[str]:
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.6)
    return [by_lower[n] for n in near]


def _suggestions(cfg: DictConfig, key: str) -> list[str]:
    """The full keys of `cfg` nearest to `key`: those with the same last name first."""
    if key in YACS_KEYS:
        return [YACS_KEYS[key]]
    keys = _all_keys(cfg)
    last = key.rsplit(".", 1)[-1].lower()
    same_last = [k for k in keys if k.rsplit(".", 1)[-1].lower() == last]
    return _closest(key, same_last, count=1) or same_last[:3] or _closest(key, keys)


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return []
    keys = []
    for name in node:
        if name == "_target_":
            continue
        keys.append(f"{prefix}{name}")
        if not OmegaConf.is_interpolation(node, name):
            keys += _all_keys(node[name], f"{prefix}{name}.")
    return keys


def _parameters(node: DictConfig) -> tuple[str, ...]:
    """The names that the `_target_` of a node takes; none where it cannot be told."""
    target = node.get("_target_")
    if isinstance(target, str):
        try:
            target = locate(target)
        except Exception:  # whatever importing it raises is reported when it is instantiated
            return ()
    if target is functools.partial:
        target = node.get("func")
    if not callable(target):
        return ()
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return ()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in parameters if p.kind in named)


def _checked_value(cfg: DictConfig, key: str, value: Any) -> Any:
    """Returns the value with the type of what it replaces, as far as that can be told.

    Raises:
        ConfigError: a number is replaced by what is none, a path by what is no text, or a section
            such as train.amp by a value.
    """
    old = _current(cfg, key)
    is_reference = isinstance(value, str) and "${" in value
    is_section = isinstance(old, DictConfig) and "_target_" not in old
    if is_section and not (is_reference or isinstance(value, dict)):
        names = [f"{key}.{name}=..." for name in old]
        raise ConfigError(f"{key} is a section, not a value; write {' or '.join(names)}")
    expected = NULLABLE_TYPES.get(key)
    if expected is None and isinstance(old, (bool, int, float, str)):
        expected = type(old)
    if expected is None or value is None:
        return value
    if is_reference:
        return value
    if expected is str:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_name = key.startswith(("train.", "dataset."))
        return str(value) if number and is_name else value
    kind = {bool: "True or False", int: "an integer", float: "a number"}[expected]
    error = ConfigError(f"{key}={value}: {key} expects {kind}, got {type(value).__name__}.")
    if isinstance(value, bool) or expected is bool:
        if isinstance(value, bool) and expected is bool:
            return value
        raise error
    if not isinstance(value, (int, float)):
        raise error
    if expected is int:
        if float(value).is_integer():
            return int(value)
        if key in NULLABLE_TYPES or key.startswith("train."):
            raise error
    return value
