"""Compares the arguments that a published checkpoint was trained with to the model to load it into.

Names and shapes do not tell them all: a DC5 backbone has those of a C5 backbone, and another
temperature of the position encoding shows nowhere. Loaded into the wrong model, such weights give a
poor AP without a word.
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

_RESNETS = {6: "resnet50", 23: "resnet101"}  # by the number of blocks in res4


def _common(values: Iterable[Any]) -> Any:
    """The value that all have, or a text that names them."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else " and ".join(map(str, different))


def _of_layers(read: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """What the encoder's and the decoder's layers have."""
    return lambda model: _common(
        read(layer) for part in (model.encoder, model.decoder) for layer in part.layers
    )


def _backbone(model: nn.Module) -> str | None:
    return _RESNETS.get(len(model.backbone.res4))


def _dilation(model: nn.Module) -> bool:
    return model.backbone.res5[-1].conv2.dilation[0] > 1


def _num_patterns(model: nn.Module) -> int:
    patterns = getattr(model.queries, "patterns", None)
    return 0 if patterns is None else len(patterns)


def _num_queries(model: nn.Module) -> int:
    return len(model.queries.content if _is_two_stage(model) else model.queries.anchors)


def _is_two_stage(model: nn.Module) -> bool:
    return not hasattr(model.queries, "anchors")


def _temperature(model: nn.Module) -> float:
    return model.neck.position_encoding.temperature


# Argument of the published code -> (what the model has for it, where a config says it).
ARGUMENTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "backbone": (_backbone, "model.backbone.depth"),
    "dilation": (_dilation, "model.backbone.dc5"),
    "num_patterns": (_num_patterns, "model.queries.num_patterns"),
    "num_queries": (_num_queries, "model.queries.num_queries"),
    "pe_temperatureH": (_temperature, "model.neck.position_encoding.temperature"),
    "pe_temperatureW": (_temperature, "model.neck.position_encoding.temperature"),
    "transformer_activation": (
        _of_layers(lambda layer: type(layer.ffn.activation).__name__.lower()),
        "model.encoder.activation and model.decoder.activation",
    ),
    "nheads": (
        _of_layers(lambda layer: layer.self_attn.num_heads),
        "model.encoder.num_heads and model.decoder.num_heads",
    ),
    "hidden_dim": (_of_layers(lambda layer: len(layer.norm1.weight)), "model.neck.embed_dim"),
    "enc_layers": (lambda model: len(model.encoder.layers), "model.encoder.num_layers"),
    "dec_layers": (lambda model: len(model.decoder.layers), "model.decoder.num_layers"),
    "dim_feedforward": (
        _of_layers(lambda layer: layer.ffn.linear1.out_features),
        "model.encoder.feedforward_dim and model.decoder.feedforward_dim",
    ),
    "num_feature_levels": (lambda model: len(model.neck.projections), "model.neck.num_levels"),
    "enc_n_points": (
        lambda model: _common(model.encoder.layers[0].self_attn.points_per_level),
        "model.encoder.num_points",
    ),
    "dec_n_points": (
        lambda model: _common(model.decoder.layers[0].cross_attn.points_per_level),
        "model.decoder.num_points",
    ),
    "two_stage": (_is_two_stage, "model.queries"),
    "two_stage_type": (
        lambda model: "standard" if _is_two_stage(model) else "no",
        "model.queries",
    ),
}


def saved_arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments that the published training scripts save beside the weights, if any."""
    saved = checkpoint.get("args")
    if isinstance(saved, argparse.Namespace):
        saved = vars(saved)
    return dict(saved) if isinstance(saved, Mapping) else None


def compare_arguments(
    arguments: Mapping[str, Any], model: nn.Module, without_effect: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Compares a model with what the arguments describe.

    Args:
        arguments: of the published code; only those in `ARGUMENTS` are looked at.
        model: the model that the weights are for.
        without_effect: arguments to leave out, see `Format.without_effect`.

    Returns:
        the names of the arguments that were compared, and a line for each that differs.
    """
    compared, wrong = [], []
    for name, (read, setting) in ARGUMENTS.items():
        if name not in arguments or name in without_effect:
            continue
        theirs = arguments[name]
        theirs = 0 if theirs is None and name == "num_patterns" else theirs
        try:
            ours = read(model)
        except (AttributeError, IndexError):  # another kind of model; its names will not fit
            ours = "(no such part)"
        compared.append(name)
        if ours != theirs:
            wrong.append(f"{name}={theirs} in the file, but {ours} in the model ({setting})")
    return compared, wrong
