"""Compares the arguments that a published checkpoint was trained with to the model to load it into.

Names and shapes do not tell them all: a DC5 backbone has those of a C5 backbone, and another
temperature of the position encoding shows nowhere. Loaded into the wrong model, such weights give a
poor AP without a word.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dn_detr.checkpoint.reading import CheckpointError

_RESNETS = {6: "resnet50", 23: "resnet101"}  # by the number of blocks in res4


def _backbone(model: nn.Module) -> str | None:
    return _RESNETS.get(len(model.backbone.res4))


def _dilation(model: nn.Module) -> bool:
    return model.backbone.res5[-1].conv2.dilation[0] > 1


def _num_patterns(model: nn.Module) -> int:
    return 0 if model.queries.patterns is None else len(model.queries.patterns)


def _temperature(model: nn.Module) -> float:
    return model.neck.position_encoding.temperature


# Argument of the published code -> (what the model has for it, where a config says it).
ARGUMENTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "backbone": (_backbone, "model.backbone.depth"),
    "dilation": (_dilation, "model.backbone.dc5"),
    "num_patterns": (_num_patterns, "model.queries.num_patterns"),
    "num_queries": (lambda model: len(model.queries.anchors), "model.queries.num_queries"),
    "pe_temperatureH": (_temperature, "model.neck.position_encoding.temperature"),
    "pe_temperatureW": (_temperature, "model.neck.position_encoding.temperature"),
    "transformer_activation": (
        lambda model: type(model.encoder.layers[0].ffn.activation).__name__.lower(),
        "model.encoder.activation and model.decoder.activation",
    ),
    "nheads": (
        lambda model: model.encoder.layers[0].self_attn.num_heads,
        "model.encoder.num_heads and model.decoder.num_heads",
    ),
    "hidden_dim": (lambda model: model.neck.projection.out_channels, "model.neck.embed_dim"),
    "enc_layers": (lambda model: len(model.encoder.layers), "model.encoder.num_layers"),
    "dec_layers": (lambda model: len(model.decoder.layers), "model.decoder.num_layers"),
    "dim_feedforward": (
        lambda model: model.encoder.layers[0].ffn.linear1.out_features,
        "model.encoder.feedforward_dim and model.decoder.feedforward_dim",
    ),
}


def saved_arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments that the published training scripts save beside the weights, if any."""
    saved = checkpoint.get("args")
    if isinstance(saved, argparse.Namespace):
        saved = vars(saved)
    return dict(saved) if isinstance(saved, Mapping) else None


def check_arguments(
    arguments: Mapping[str, Any], model: nn.Module, kind: str, config_file: str
) -> list[str]:
    """Checks that a model is what the arguments describe.

    Args:
        arguments: of the published code; only those in `ARGUMENTS` are looked at.
        model: the model that the weights are for.
        kind: "dn_detr" or "dab_detr", for the name of the right config.
        config_file: the model's, for messages.

    Returns:
        the names of the arguments that were compared.

    Raises:
        CheckpointError: one contradicts the model; the message names both and the remedy.
    """
    compared, wrong = [], []
    for name, (read, setting) in ARGUMENTS.items():
        if name not in arguments:
            continue
        theirs = arguments[name]
        theirs = 0 if theirs is None and name == "num_patterns" else theirs
        try:
            ours = read(model)
        except (AttributeError, IndexError):  # another kind of model; its names will not fit
            ours = "(no such part)"
        compared.append(name)
        if ours != theirs:
            wrong.append(f"  {name}={theirs} in the file, but {ours} in the model ({setting})")
    if wrong:
        listing = "\n".join(wrong)
        raise CheckpointError(
            f"The weights were trained as another model than {config_file} describes:\n{listing}\n"
            f"{_remedy(arguments, kind, config_file)}"
        )
    return compared


def _remedy(arguments: Mapping[str, Any], kind: str, config_file: str) -> str:
    name = f"{kind}_{str(arguments.get('backbone', 'resnet50')).replace('resnet', 'r')}"
    name += "_dc5" if arguments.get("dilation") else ""
    patterns = arguments.get("num_patterns")
    name += f"_{patterns}pat" if patterns else ""
    folder = Path(config_file).parent
    fitting = sorted(p for p in folder.glob("*.py") if re.fullmatch(rf"{name}_\d+ep", p.stem))
    same = [path for path in fitting if path.name == Path(config_file).name]
    if fitting and not same:
        return f"Use --config-file {' or '.join(map(str, fitting))}."
    return "Set the values named in brackets on the command line, behind the config file."
