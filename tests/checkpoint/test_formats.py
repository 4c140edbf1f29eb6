import re

import pytest
import torch

from dn_detr.checkpoint.formats import (
    FORMATS,
    describe_relative,
    detect_format,
    rename,
    resolve_ties,
    without_ddp_prefix,
)
from dn_detr.checkpoint.reading import CheckpointError
from tests.checkpoint.published import PUBLISHED, to_detrex
from tests.golden.seeded import published_shapes, published_state_dict

# Second names: of the heads, and in detrex of the slopes of PReLU.
NUM_TIED = {
    "dn_detr": 6,
    "dab_detr": 6,
    "dn_deformable_encoder": 6,
    "detrex_dn_detr": 18,
    "detrex_dab_detr": 18,
    "dn_dino": 7 * 8,
    "detrex_dino": 7 * 8,
    "dino": 6 * 8 + 5 * 8,
}
# Published model -> the official one that it would be, in detrex.
DETREX = {
    "detrex_dn_detr_r50": "dn_dab_detr_r50",
    "detrex_dn_deformable_detr_r50": "dn_dab_deformable_detr_r50",
    "detrex_dab_deformable_detr_r50": "dab_deformable_detr_r50",
    "detrex_dino_r50_4scale": "dino_r50_4scale",
}


def empty_state(variant):
    """A published state_dict without its numbers."""
    return {name: torch.empty(s, device="meta") for name, s in published_shapes(variant).items()}


def every_state():
    """(key of its format, state_dict) of every published model known here."""
    for variant, (key, _) in PUBLISHED.items():
        yield key, empty_state(variant)
    yield "detrex_dab_detr", to_detrex(empty_state("dab_detr_r50"))
    dc5 = to_detrex(empty_state("dn_dab_detr_r50_dc5_3pat"), dc5=True)
    yield "detrex_dn_detr", dc5
    converted = empty_state("detrex_dn_deformable_detr_r50")
    converted["label_encoder.weight"] = converted.pop("denoising_generator.label_encoder.weight")
    yield "detrex_dn_deformable_detr_converted", converted


def test_formats_are_told_apart():
    seen = set()
    for key, state in every_state():
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        assert [k for k, known in FORMATS.items() if known.matches(shapes)] == [key]
        assert detect_format(state) == key
        seen.add(key)
    assert seen == FORMATS.keys()


def test_every_name_is_mapped_to_one_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "equal", lambda a, b: a.shape == b.shape)  # no numbers here
    for key, state in every_state():
        single, tied = resolve_ties(state, FORMATS[key].tied)
        sources, unknown = rename(single, FORMATS[key].rules)
        assert not unknown
        assert len(sources) == len(single) == len(state) - len(tied)
        assert len(tied) == NUM_TIED.get(key, 6 * 6)
        # All rooms of the model, and nothing of the published ones
        rooms = {name.split(".")[0] for name in sources}
        assert rooms == {"backbone", "neck", "encoder", "decoder", "heads", "queries"}


def test_every_rule_is_used():
    used = set()
    for key, state in every_state():
        rules = [*FORMATS[key].rules, *FORMATS[key].tied]
        for name in state:
            matching = (rule for rule in rules if rename([name], (rule,))[0])
            used.add(next(matching))
            used.update(rule for rule in FORMATS[key].tied if rename([name], (rule,))[0])
    everything = {rule for known in FORMATS.values() for rule in (*known.rules, *known.tied)}
    assert everything == used


@pytest.mark.parametrize("variant, official", DETREX.items())
def test_detrex_names_are_those_of_detrex(variant, official):
    theirs = to_detrex(empty_state(official))
    assert {name: tuple(value.shape) for name, value in theirs.items()} == published_shapes(variant)


def drop(name):
    return lambda state: state.pop(name)


def add(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape, device="meta")})


@pytest.mark.parametrize(
    "variant, changes, text",
    [
        ("dn_dab_detr_r50", [add("refpoint_embed.weight", 300, 2)], None),
        ("dn_dab_detr_r50", [add("input_proj.weight", 256)], None),
        # Deformable DETR: with one stage, and with two
        (
            "dab_deformable_detr_r50",
            [
                drop("refpoint_embed.weight"),
                drop("tgt_embed.weight"),
                add("query_embed.weight", 300, 512),
                add("transformer.reference_points.weight", 2, 256),
            ],
            "Deformable DETR, which has points instead of anchors",
        ),
        (
            "dab_deformable_detr_r50",
            [
                drop("refpoint_embed.weight"),
                drop("tgt_embed.weight"),
                add("transformer.enc_output.weight", 256, 256),
                add("transformer.pos_trans.weight", 512, 512),
            ],
            "two-stage Deformable DETR or two-stage DAB-Deformable-DETR",
        ),
        (
            "detrex_dab_deformable_detr_r50",
            [
                drop("refpoint_embed.weight"),
                drop("tgt_embed.weight"),
                add("transformer.enc_output.weight", 256, 256),
            ],
            "whose contents are the encoder's tokens",
        ),
        ("detrex_dino_r50_4scale", [add("transformer.level_embeds", 5, 256)], "5 feature levels"),
        (
            "detrex_dn_deformable_detr_r50",
            [add("transformer.level_embeds", 5, 256)],
            "5 feature levels",
        ),
        # DETR and Conditional DETR
        (
            "dab_detr_r50",
            [drop("refpoint_embed.weight"), add("query_embed.weight", 100, 256)],
            "DETR, Conditional DETR or the like",
        ),
        (
            "dab_deformable_detr_r50",
            [drop("refpoint_embed.weight")],
            r"a deformable model \(several feature levels\)",
        ),
    ],
)
def test_relatives_are_not_taken_for_them(variant, changes, text):
    state = empty_state(variant)
    for change in changes:
        change(state)
    assert detect_format(state) is None
    guess = describe_relative(state)
    assert (guess is None) if text is None else re.search(text, guess)


def test_what_is_no_relative_at_all():
    state = {"conv1.weight": torch.zeros(1)}
    assert detect_format(state) is None and describe_relative(state) is None


NAMES = {
    "dn_detr": {
        "transformer.decoder.layers.3.ca_qpos_sine_proj.weight": (
            "decoder.layers.3.cross_attn.query_sine.weight"
        ),
        "transformer.decoder.layers.0.ca_qpos_proj.bias": (
            "decoder.layers.0.cross_attn.query_position.bias"
        ),
        "transformer.decoder.layers.5.self_attn.out_proj.weight": (
            "decoder.layers.5.self_attn.output.weight"
        ),
        "transformer.encoder.layers.2.self_attn.out_proj.weight": (
            "encoder.layers.2.self_attn.out_proj.weight"
        ),
        "backbone.0.body.layer4.2.bn3.running_var": "backbone.res5.2.conv3.norm.running_var",
        "backbone.0.body.layer1.0.downsample.1.bias": "backbone.res2.0.shortcut.norm.bias",
        "backbone.0.body.bn1.weight": "backbone.stem.conv1.norm.weight",
    },
    "dn_deformable_detr": {
        # Self-attention runs first, and is followed by what is called norm2.
        "transformer.decoder.layers.3.norm1.weight": "decoder.layers.3.norm2.weight",
        "transformer.decoder.layers.3.norm2.weight": "decoder.layers.3.norm1.weight",
        "transformer.decoder.layers.3.norm3.bias": "decoder.layers.3.norm3.bias",
        "transformer.encoder.layers.3.norm1.weight": "encoder.layers.3.norm1.weight",
        "transformer.decoder.layers.1.self_attn.in_proj_bias": (
            "decoder.layers.1.self_attn.in_proj.bias"
        ),
        "transformer.encoder.layers.1.self_attn.attention_weights.bias": (
            "encoder.layers.1.self_attn.weights.bias"
        ),
        "input_proj.3.1.weight": "neck.projections.3.1.weight",
        "class_embed.5.bias": "heads.class_embed.5.bias",
        "tgt_embed.weight": "queries.content",
    },
    "dn_deformable_encoder": {
        "transformer.decoder.layers.2.norm1.weight": "decoder.layers.2.norm1.weight",
        "transformer.decoder.layers.2.ca_out_v_proj.bias": (
            "decoder.layers.2.cross_attn.output.bias"
        ),
        "transformer.decoder.layers.2.lvl_attn.weight": "decoder.layers.2.level_weights.weight",
    },
    "detrex_dn_deformable_detr": {
        "transformer.decoder.layers.3.norms.0.weight": "decoder.layers.3.norm1.weight",
        "transformer.decoder.layers.3.norms.1.weight": "decoder.layers.3.norm2.weight",
        "neck.extra_convs.0.norm.bias": "neck.projections.3.1.bias",
        "neck.convs.2.conv.bias": "neck.projections.2.0.bias",
    },
    "dn_dino": {
        "class_embed.6.weight": "queries.class_embed.weight",
        "bbox_embed.6.layers.2.bias": "queries.bbox_embed.layers.2.bias",
        "bbox_embed.5.layers.2.bias": "heads.bbox_embed.5.layers.2.bias",
    },
    "dino": {
        "class_embed.0.weight": "heads.class_embed.weight",
        "transformer.enc_out_class_embed.weight": "queries.class_embed.weight",
        "transformer.enc_output_norm.bias": "queries.norm.bias",
    },
}


@pytest.mark.parametrize("key", NAMES)
def test_names_keep_their_places(key):
    sources, unknown = rename(NAMES[key], FORMATS[key].rules)
    assert not unknown and {v: k for k, v in sources.items()} == NAMES[key]


def test_ties_are_checked_and_dropped():
    name = "bbox_embed.layers.0.bias"
    state = {name: torch.ones(2), f"transformer.decoder.{name}": torch.ones(2)}
    single, tied = resolve_ties(state, FORMATS["dn_detr"].tied)
    assert list(single) == [name] and tied == [f"transformer.decoder.{name}"]
    state[name] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=f"transformer.decoder.{name} and {name} .* differ"):
        resolve_ties(state, FORMATS["dn_detr"].tied)


@pytest.mark.parametrize(
    "changed", ["class_embed.3.bias", "transformer.decoder.class_embed.5.bias"]
)
def test_all_names_of_a_tensor_are_compared(changed):
    state = published_state_dict("dino_r50_4scale")
    single, tied = resolve_ties(state, FORMATS["dino"].tied)
    assert [name for name in single if "class_embed" in name and "enc_out" not in name] == [
        "class_embed.0.weight",
        "class_embed.0.bias",
    ]
    assert len(tied) == NUM_TIED["dino"] and len(single) == len(state) - len(tied)
    with pytest.raises(CheckpointError, match="class_embed.*differ in this file"):
        resolve_ties({**state, changed: state[changed] + 1}, FORMATS["dino"].tied)
    # Where every layer has heads of its own, these are no names of one tensor.
    assert len(resolve_ties(state, FORMATS["dn_dino"].tied)[0]) == len(single) + 5 * 8


def test_a_tensor_under_its_second_name_only_is_kept():
    state = {"transformer.decoder.bbox_embed.layers.0.bias": torch.ones(2)}
    single, _ = resolve_ties(state, FORMATS["dn_detr"].tied)
    assert list(single) == ["bbox_embed.layers.0.bias"]


def test_ddp_prefix():
    assert without_ddp_prefix({"module.a": 1, "module.b": 2}) == {"a": 1, "b": 2}
    assert without_ddp_prefix({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
