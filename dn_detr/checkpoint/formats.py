"""The checkpoint formats of others: how to tell them apart, and their names in this project.

A format is a table of rules, from a regular expression of the published name to the name here; the
first rule that matches a whole name counts. Sources of the names: the state_dicts of
IDEA-Research/DN-DETR (commit ff3902a), IDEA-Research/DAB-DETR and IDEA-Research/detrex (commit
e244e6c: projects/dn_detr, projects/dab_detr).
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dn_detr.checkpoint.reading import CheckpointError

Rules = tuple[tuple[str, str], ...]

# torchvision's names behind "backbone.0.body." (official) or "backbone.body." (detrex, DC5 only);
# detrex's other models have detectron2's own names already.
_BODY = r"backbone\.(?:0\.)?body\."
BACKBONE: Rules = (
    (_BODY + r"conv1\.(\w+)", r"backbone.stem.conv1.\1"),
    (_BODY + r"bn1\.(\w+)", r"backbone.stem.conv1.norm.\1"),
    *(
        rule
        for layer in (1, 2, 3, 4)
        for block in [_BODY + rf"layer{layer}\.(\d+)\."]
        for target in [rf"backbone.res{layer + 1}.\1."]
        for rule in (
            (block + r"conv(\d)\.(\w+)", target + r"conv\2.\3"),
            (block + r"bn(\d)\.(\w+)", target + r"conv\2.norm.\3"),
            (block + r"downsample\.0\.(\w+)", target + r"shortcut.\2"),
            (block + r"downsample\.1\.(\w+)", target + r"shortcut.norm.\2"),
        )
    ),
    (r"backbone\.((?:stem|res\d)\..+)", r"backbone.\1"),
)

SHARED: Rules = (
    (r"input_proj\.(\w+)", r"neck.projection.\1"),
    (r"transformer\.encoder\.query_scale\.(.+)", r"encoder.position_scale.\1"),
    (r"transformer\.decoder\.query_scale\.(.+)", r"decoder.position_scale.\1"),
    (r"transformer\.decoder\.ref_point_head\.(.+)", r"decoder.anchor_position.\1"),
    (r"transformer\.decoder\.ref_anchor_head\.(.+)", r"decoder.size_scale.\1"),
    (r"(class_embed|bbox_embed)\.(.+)", r"heads.\1.\2"),
    (r"transformer\.patterns\.weight", r"queries.patterns"),
)

_LAYER = r"transformer\.(encoder|decoder)\.layers\.(\d+)\."
_ENCODER = r"transformer\.encoder\.layers\.(\d+)\."
_DECODER = r"transformer\.decoder\.layers\.(\d+)\."
_SELF, _CROSS = r"decoder.layers.\1.self_attn.", r"decoder.layers.\1.cross_attn."

OFFICIAL: Rules = (
    *BACKBONE,
    *SHARED,
    (_ENCODER + r"self_attn\.(.+)", r"encoder.layers.\1.self_attn.\2"),
    (_LAYER + r"(linear\d|activation)\.(\w+)", r"\1.layers.\2.ffn.\3.\4"),
    (_LAYER + r"(norm\d)\.(\w+)", r"\1.layers.\2.\3.\4"),
    (_DECODER + r"sa_qcontent_proj\.(\w+)", _SELF + r"query_content.\2"),
    (_DECODER + r"sa_qpos_proj\.(\w+)", _SELF + r"query_position.\2"),
    (_DECODER + r"sa_kcontent_proj\.(\w+)", _SELF + r"key_content.\2"),
    (_DECODER + r"sa_kpos_proj\.(\w+)", _SELF + r"key_position.\2"),
    (_DECODER + r"sa_v_proj\.(\w+)", _SELF + r"value.\2"),
    (_DECODER + r"self_attn\.out_proj\.(\w+)", _SELF + r"output.\2"),
    (_DECODER + r"ca_qcontent_proj\.(\w+)", _CROSS + r"query_content.\2"),
    (_DECODER + r"ca_qpos_proj\.(\w+)", _CROSS + r"query_position.\2"),
    (_DECODER + r"ca_kcontent_proj\.(\w+)", _CROSS + r"key_content.\2"),
    (_DECODER + r"ca_kpos_proj\.(\w+)", _CROSS + r"key_position.\2"),
    (_DECODER + r"ca_v_proj\.(\w+)", _CROSS + r"value.\2"),
    (_DECODER + r"ca_qpos_sine_proj\.(\w+)", _CROSS + r"query_sine.\2"),
    (_DECODER + r"cross_attn\.out_proj\.(\w+)", _CROSS + r"output.\2"),
    (r"transformer\.decoder\.norm\.(\w+)", r"decoder.norm.\1"),
    (r"refpoint_embed\.weight", r"queries.anchors"),
    (r"label_enc\.weight", r"queries.label_embed.weight"),
)

_ATTENTION = _DECODER + r"attentions\.0\."
_CROSS_ATTENTION = _DECODER + r"attentions\.1\."
_FFN = _LAYER + r"ffns\.0\.layers\."
_NORM_1, _NORM_2, _NORM_3 = (_LAYER + rf"norms\.{i}\.(\w+)" for i in range(3))

DETREX: Rules = (
    *BACKBONE,
    *SHARED,
    (_ENCODER + r"attentions\.0\.attn\.(.+)", r"encoder.layers.\1.self_attn.\2"),
    (_FFN + r"0\.0\.(\w+)", r"\1.layers.\2.ffn.linear1.\3"),
    (_FFN + r"0\.1\.(\w+)", r"\1.layers.\2.ffn.activation.\3"),
    (_FFN + r"1\.(\w+)", r"\1.layers.\2.ffn.linear2.\3"),
    (_NORM_1, r"\1.layers.\2.norm1.\3"),
    (_NORM_2, r"\1.layers.\2.norm2.\3"),
    (_NORM_3, r"\1.layers.\2.norm3.\3"),
    (_ATTENTION + r"query_content_proj\.(\w+)", _SELF + r"query_content.\2"),
    (_ATTENTION + r"query_pos_proj\.(\w+)", _SELF + r"query_position.\2"),
    (_ATTENTION + r"key_content_proj\.(\w+)", _SELF + r"key_content.\2"),
    (_ATTENTION + r"key_pos_proj\.(\w+)", _SELF + r"key_position.\2"),
    (_ATTENTION + r"value_proj\.(\w+)", _SELF + r"value.\2"),
    (_ATTENTION + r"out_proj\.(\w+)", _SELF + r"output.\2"),
    (_CROSS_ATTENTION + r"query_content_proj\.(\w+)", _CROSS + r"query_content.\2"),
    (_CROSS_ATTENTION + r"query_pos_proj\.(\w+)", _CROSS + r"query_position.\2"),
    (_CROSS_ATTENTION + r"key_content_proj\.(\w+)", _CROSS + r"key_content.\2"),
    (_CROSS_ATTENTION + r"key_pos_proj\.(\w+)", _CROSS + r"key_position.\2"),
    (_CROSS_ATTENTION + r"value_proj\.(\w+)", _CROSS + r"value.\2"),
    (_CROSS_ATTENTION + r"query_pos_sine_proj\.(\w+)", _CROSS + r"query_sine.\2"),
    (_CROSS_ATTENTION + r"out_proj\.(\w+)", _CROSS + r"output.\2"),
    (r"transformer\.decoder\.post_norm_layer\.(\w+)", r"decoder.norm.\1"),
    (r"anchor_box_embed\.weight", r"queries.anchors"),
    (r"denoising_generator\.label_encoder\.weight", r"queries.label_embed.weight"),
)

# One tensor under two names: the first is dropped after a check that both are equal.
TIED: Rules = (
    (r"transformer\.decoder\.(bbox_embed\..+)", r"\1"),
    (r"(transformer\..+\.ffns\.0)\.activation\.(\w+)", r"\1.layers.0.1.\2"),
)

# Counters that frozen batch norms do not have; they change nothing in evaluation.
IGNORED = r".+\.num_batches_tracked"


@dataclass(frozen=True)
class Format:
    """A family of published checkpoints.

    Attributes:
        title: for messages.
        model: "dn_detr" or "dab_detr", the first part of the config files that fit.
        required: names that every such checkpoint has.
        absent: names that no such checkpoint has.
        rules: from its names to those of this project.
    """

    title: str
    model: str
    required: tuple[str, ...]
    absent: tuple[str, ...]
    rules: Rules

    def matches(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a checkpoint with these names and shapes is of this format."""
        if not shapes.keys() >= set(self.required) or not shapes.keys().isdisjoint(self.absent):
            return False
        # One feature level and 4-D anchors: what DAB-DETR and DN-DETR have in common.
        anchors, projection = shapes[self.required[0]], shapes["input_proj.weight"]
        return len(projection) == 4 and anchors[1:] == (4,)


_OFFICIAL_NAMES = (
    "refpoint_embed.weight",
    "input_proj.weight",
    "transformer.encoder.query_scale.layers.0.weight",
    "transformer.decoder.ref_point_head.layers.0.weight",
    "transformer.decoder.layers.0.ca_qpos_sine_proj.weight",
)
_DETREX_NAMES = (
    "anchor_box_embed.weight",
    "input_proj.weight",
    "transformer.encoder.query_scale.layers.0.weight",
    "transformer.decoder.ref_point_head.layers.0.weight",
    "transformer.decoder.layers.0.attentions.1.query_pos_sine_proj.weight",
)
_LABELS, _DETREX_LABELS = "label_enc.weight", "denoising_generator.label_encoder.weight"

FORMATS = {
    "dn_detr": Format("official DN-DETR", "dn_detr", (*_OFFICIAL_NAMES, _LABELS), (), OFFICIAL),
    "dab_detr": Format("official DAB-DETR", "dab_detr", _OFFICIAL_NAMES, (_LABELS,), OFFICIAL),
    "detrex_dn_detr": Format(
        "detrex DN-DETR", "dn_detr", (*_DETREX_NAMES, _DETREX_LABELS), (), DETREX
    ),
    "detrex_dab_detr": Format(
        "detrex DAB-DETR", "dab_detr", _DETREX_NAMES, (_DETREX_LABELS,), DETREX
    ),
}


def detect_format(state: Mapping[str, Tensor]) -> str | None:
    """The key in `FORMATS` of a state_dict without "module." prefixes, told by names and shapes."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return next((key for key, known in FORMATS.items() if known.matches(shapes)), None)


def without_ddp_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of the model inside DistributedDataParallel, whose names all start so."""
    prefix = "module."
    if state and all(name.startswith(prefix) for name in state):
        return {name[len(prefix) :]: value for name, value in state.items()}
    return dict(state)


def resolve_ties(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Every tensor under one name only, and the second names that were dropped.

    Raises:
        CheckpointError: the tensors under the two names differ.
    """
    resolved, dropped = dict(state), []
    for alias, value in state.items():
        name = _first_match(TIED, alias)
        if name is None:
            continue
        del resolved[alias]
        dropped.append(alias)
        if not value.equal(state.get(name, value)):
            raise CheckpointError(
                f"{alias} and {name} are one tensor in the published models, but differ in this "
                f"file: it comes from another model (or from modified code) and is not converted."
            )
        resolved[name] = value
    return resolved, dropped


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
