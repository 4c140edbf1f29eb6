import pytest
import torch

from dn_detr.checkpoint.formats import (
    FORMATS,
    detect_format,
    rename,
    resolve_ties,
    without_ddp_prefix,
)
from dn_detr.checkpoint.reading import CheckpointError
from tests.checkpoint.published import to_detrex
from tests.golden import seeded
from tests.golden.seeded import VARIANTS, published_state_dict


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_formats_are_told_apart(variant):
    expected = "dab_detr" if variant.startswith("dab") else "dn_detr"
    state = published_state_dict(variant)
    assert detect_format(state) == expected
    assert detect_format(to_detrex(state, dc5="dc5" in variant)) == f"detrex_{expected}"


def test_relatives_are_not_taken_for_them():
    state = published_state_dict("dn_dab_detr_r50")
    deformable = dict(state, **{"input_proj.weight": torch.zeros(4)})
    assert detect_format(deformable) is None
    assert detect_format(dict(state, **{"refpoint_embed.weight": torch.zeros(300, 2)})) is None
    assert detect_format({"conv1.weight": torch.zeros(1)}) is None


def test_detrex_names_are_those_of_detrex():
    theirs = to_detrex(published_state_dict("dn_dab_detr_r50"), dc5=False)
    expected = seeded.listed_shapes("detrex_dn_detr_r50.txt")
    assert {name: tuple(value.shape) for name, value in theirs.items()} == expected


@pytest.mark.parametrize("key", FORMATS)
def test_every_name_is_mapped_to_one_of_its_own(key):
    variant = "dab_detr_r50" if "dab" in key else "dn_dab_detr_r50_dc5_3pat"
    for dc5 in (False, True):
        state = published_state_dict(variant)
        state = to_detrex(state, dc5) if "detrex" in key else state
        single, tied = resolve_ties(state)
        sources, unknown = rename(single, FORMATS[key].rules)
        assert not unknown
        assert len(sources) == len(single) == len(state) - len(tied)
        assert len(tied) == (18 if "detrex" in key else 6)
        # All rooms of the model, and nothing of the published ones
        rooms = {name.split(".")[0] for name in sources}
        assert rooms == {"backbone", "neck", "encoder", "decoder", "heads", "queries"}


def test_every_rule_is_used():
    used = set()
    for variant in ("dab_detr_r50", "dn_dab_detr_r50_dc5_3pat"):
        state = published_state_dict(variant)
        for state in (state, to_detrex(state, False), to_detrex(state, True)):
            rules = FORMATS[detect_format(state)].rules
            single, _ = resolve_ties(state)
            for name in single:
                sources, _ = rename([name], rules)
                used.update(r for r in rules if rename([name], (r,))[0] == sources)
    everything = {rule for known in FORMATS.values() for rule in known.rules}
    assert everything == used


def test_decoder_layers_keep_their_places():
    decoder, encoder = "transformer.decoder.layers", "transformer.encoder.layers"
    names = {
        f"{decoder}.3.ca_qpos_sine_proj.weight": "decoder.layers.3.cross_attn.query_sine.weight",
        f"{decoder}.0.ca_qpos_proj.bias": "decoder.layers.0.cross_attn.query_position.bias",
        f"{decoder}.5.self_attn.out_proj.weight": "decoder.layers.5.self_attn.output.weight",
        f"{encoder}.2.self_attn.out_proj.weight": "encoder.layers.2.self_attn.out_proj.weight",
        "backbone.0.body.layer4.2.bn3.running_var": "backbone.res5.2.conv3.norm.running_var",
        "backbone.0.body.layer1.0.downsample.1.bias": "backbone.res2.0.shortcut.norm.bias",
        "backbone.0.body.bn1.weight": "backbone.stem.conv1.norm.weight",
    }
    sources, unknown = rename(names, FORMATS["dn_detr"].rules)
    assert not unknown and {v: k for k, v in sources.items()} == names


def test_ties_are_checked_and_dropped():
    state = {
        "bbox_embed.layers.0.bias": torch.ones(2),
        "transformer.decoder.bbox_embed.layers.0.bias": torch.ones(2),
    }
    single, tied = resolve_ties(state)
    assert list(single) == ["bbox_embed.layers.0.bias"]
    assert tied == ["transformer.decoder.bbox_embed.layers.0.bias"]
    state["bbox_embed.layers.0.bias"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="differ"):
        resolve_ties(state)


def test_a_tensor_under_its_second_name_only_is_kept():
    single, _ = resolve_ties({"transformer.decoder.bbox_embed.layers.0.bias": torch.ones(2)})
    assert list(single) == ["bbox_embed.layers.0.bias"]


def test_ddp_prefix():
    assert without_ddp_prefix({"module.a": 1, "module.b": 2}) == {"a": 1, "b": 2}
    assert without_ddp_prefix({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
