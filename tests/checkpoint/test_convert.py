"""The converter on files as their authors would have saved them, into the shipped configs."""

import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import instantiate  # noqa: E402

from dn_detr.checkpoint.checkpointer import CheckpointError, DNCheckpointer  # noqa: E402
from dn_detr.checkpoint.coco import COCO_CATEGORIES  # noqa: E402
from dn_detr.checkpoint.convert import convert_file  # noqa: E402
from dn_detr.checkpoint.reading import read_checkpoint  # noqa: E402
from dn_detr.checkpoint.state_dicts import convert_state_dict  # noqa: E402
from dn_detr.engine.config import load_config  # noqa: E402
from tests.checkpoint.published import (  # noqa: E402
    COCO_IDS,
    config_of,
    official_arguments,
    save_official,
    to_detrex,
)
from tests.golden.seeded import published_state_dict  # noqa: E402

ROOT = Path(__file__).parents[2]
# A file takes seconds; what needs none is in test_fitting.py and test_formats.py.
CONVERTED = [
    "dn_dab_detr_r50",
    "dab_detr_r50",
    "dn_dab_deformable_detr_r50",
    "dn_dab_deformable_detr_deformable_encoder_only_r50",
    "dn_dab_dino_deformable_detr_r50",
    "dino_r50_4scale",
]


def convert(source, output, variant: str, *overrides: str) -> str:
    """Converts a file into the config that a published model fits."""
    path = str(config_of(variant))
    return convert_file(str(source), str(output), load_config(path, list(overrides)), path)


def build(variant: str, num_classes: int = 80):
    """The model that a published one fits."""
    cfg = load_config(str(config_of(variant)), [f"model.num_classes={num_classes}"])
    return instantiate(cfg.model)


@cache
def own_state(variant: str):
    """Names and shapes of that model."""
    with torch.device("meta"):
        return build(variant).state_dict()


def test_categories_are_detectron2s():
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES as known

    things = [{"id": c["id"], "name": c["name"]} for c in known if c["isthing"]]
    assert things == list(COCO_CATEGORIES) and [c["id"] for c in things] == COCO_IDS


@pytest.mark.fault(32)
@pytest.mark.parametrize("variant", CONVERTED)
def test_official_files_convert_and_load(tmp_path, variant):
    source = save_official(tmp_path / "official.pth", variant)
    table = convert(source, tmp_path / "out" / "converted.pth", variant)
    assert "80 of 91, by COCO's category ids" in table and "verified" in table
    assert "dilation" in table and "WARNING" not in table
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["converted.pth"]

    checkpoint = read_checkpoint(tmp_path / "out" / "converted.pth")
    assert checkpoint["metadata"]["categories"] == list(COCO_CATEGORIES)
    assert "num_classes: 80" in checkpoint["metadata"]["config"]
    published, own = published_state_dict(variant), checkpoint["model"]
    shapes = {name: value.shape for name, value in own_state(variant).items()}
    assert {name: value.shape for name, value in own.items()} == shapes
    for name in own:
        if name.startswith("heads.class_embed"):
            # Where all layers share one head, its name has no number.
            theirs = name.removeprefix("heads.")
            theirs = theirs if theirs in published else theirs.replace("_embed.", "_embed.0.")
            assert own[name].equal(published[theirs][COCO_IDS])
    if "label_enc.weight" in published:
        labels = published["label_enc.weight"][[*COCO_IDS, 91]]
        assert own["queries.label_embed.weight"].equal(labels)
    assert own["backbone.res4.5.conv3.norm.running_var"].equal(
        published["backbone.0.body.layer3.5.bn3.running_var"]
    )


@pytest.mark.fault(34)
def test_conversion_to_safetensors_is_the_same(tmp_path):
    source = save_official(tmp_path / "official.pth", "dn_dab_detr_r50")
    outputs = [tmp_path / "a.pth", tmp_path / "a.safetensors"]
    for output in outputs:
        assert "verified" in convert(source, output, "dn_dab_detr_r50")
    pth, tensors = map(read_checkpoint, outputs)
    assert pth["metadata"] == tensors["metadata"] and pth["model"].keys() == tensors["model"].keys()
    assert all(value.equal(tensors["model"][name]) for name, value in pth["model"].items())
    model = build("dn_dab_detr_r50")
    DNCheckpointer(model).load_weights(str(outputs[1]), categories=COCO_CATEGORIES, strict=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "a.safetensors", "official.pth"]


@pytest.mark.parametrize(
    "variant, name, rows, text",
    [
        ("dino_r50_4scale", "transformer.enc_out_class_embed", COCO_IDS, "[]"),
        ("dn_dab_dino_deformable_detr_r50", "class_embed.6", [0], "tells objects from background"),
    ],
)
def test_proposals_by_class_and_by_objectness(variant, name, rows, text):
    published = published_state_dict(variant)
    done = convert_state_dict(published, own_state(variant))
    for part in ("weight", "bias"):
        expected = published[f"{name}.{part}"][rows]
        assert done.state[f"queries.class_embed.{part}"].equal(expected)
    assert done.classes == "80 of 91, by COCO's category ids" and text in str(done.adjusted)


@pytest.mark.parametrize("variant", ["dn_dab_dino_deformable_detr_r50", "dino_r50_4scale"])
def test_all_91_rows_are_kept_where_the_config_says_so(tmp_path, variant):
    source = save_official(tmp_path / "official.pth", variant)
    output = tmp_path / "converted.pth"
    assert "all 91 kept" in convert(source, output, variant, "model.num_classes=91")
    model = build(variant, 91)
    DNCheckpointer(model).load_weights(str(output), categories=COCO_CATEGORIES, strict=True)
    state, published = model.state_dict(), published_state_dict(variant)
    assert state["queries.label_embed.weight"].equal(published["label_enc.weight"])
    heads = [name for name in state if name.startswith("heads.class_embed")]
    assert heads and all(len(state[name]) == 91 for name in heads)
    assert len(state["queries.class_embed.bias"]) == (1 if "dab_dino" in variant else 91)


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    "variant, official, dc5",
    [
        ("detrex_dn_detr_r50", "dn_dab_detr_r50", False),
        ("detrex_dn_detr_r50", "dn_dab_detr_r50_dc5", True),
        ("detrex_dn_deformable_detr_r50", "dn_dab_deformable_detr_r50", False),
        ("detrex_dab_deformable_detr_r50", "dab_deformable_detr_r50", False),
    ],
)
def test_detrex_files_convert_to_the_same(variant, official, dc5):
    published = published_state_dict(official)
    own = own_state(variant)
    expected = convert_state_dict(published, own).state
    detrex = convert_state_dict(to_detrex(published, dc5), own).state
    assert expected.keys() == detrex.keys() == own.keys()
    assert all(detrex[name].equal(expected[name]) for name in expected)


def test_detrex_dino_has_a_head_for_every_layer_and_no_unknown_label():
    published = published_state_dict("dino_r50_4scale")
    expected = convert_state_dict(published, own_state("dino_r50_4scale")).state
    own = own_state("detrex_dino_r50_4scale")
    done = convert_state_dict(to_detrex(published), own)
    labels = done.state.pop("queries.label_embed.weight")
    assert labels[:80].equal(expected.pop("queries.label_embed.weight")[:80])
    assert labels[80:].equal(torch.zeros(1, 256)) and "which DINO never uses" in done.adjusted[0]
    for name, value in done.state.items():
        assert value.equal(expected[re.sub(r"^(heads\.\w+)\.\d", r"\1", name)]), name


def test_detrex_files_with_averaged_weights(tmp_path):
    state = published_state_dict("detrex_dn_deformable_detr_r50")
    state["label_encoder.weight"] = state.pop("denoising_generator.label_encoder.weight")
    data = {"model": state, "ema_state": {"class_embed.0.bias": torch.ones(80)}, "iteration": 9}
    torch.save(data, tmp_path / "detrex.pth")
    table = convert(tmp_path / "detrex.pth", tmp_path / "a.pth", "detrex_dn_deformable_detr_r50")
    assert "detrex DN-Deformable-DETR (converted)" in table and "all 80 kept" in table
    assert 'the averaged weights, "ema_state" in the file, are left out' in table
    assert "does not say with which arguments" in table and "DC5" not in table


def test_a_dino_without_its_second_stage_is_told_by_its_arguments(tmp_path):
    variant = "dn_dab_deformable_detr_r50"
    arguments = official_arguments(variant)
    arguments.modelname = "dn_dab_dino_deformable_detr"
    source = save_official(tmp_path / "official.pth", variant, args=arguments)
    assert "WARNING: this is the DN-DETR repository's DINO without --two_stage" in convert(
        source, tmp_path / "a.pth", variant
    )


@pytest.mark.parametrize(
    "variant, warning",
    [
        ("dn_dab_detr_r50", "DC5 weights cannot be told from C5 weights"),
        ("dn_dab_deformable_detr_r50", "its names are also those of the DN-DETR repository's DINO"),
    ],
)
def test_ddp_prefixes_and_bare_state_dicts(tmp_path, variant, warning):
    state = published_state_dict(variant)
    prefixed = {f"module.{name}": value for name, value in state.items()}
    save_official(tmp_path / "ddp.pth", variant, model=prefixed)
    convert(tmp_path / "ddp.pth", tmp_path / "a.pth", variant)
    torch.save(state, tmp_path / "bare.pth")
    table = convert(tmp_path / "bare.pth", tmp_path / "b.pth", variant)
    assert "does not say with which arguments" in table
    assert table.count("WARNING") == 2 and warning in table
    a, b = (read_checkpoint(tmp_path / f"{name}.pth")["model"] for name in "ab")
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_another_model_is_refused(tmp_path):
    source = save_official(tmp_path / "official.pth", "dn_dab_detr_r50_dc5")
    with pytest.raises(CheckpointError) as error:
        convert(source, tmp_path / "converted.pth", "dn_dab_detr_r50")
    config = config_of("dn_dab_detr_r50")
    assert str(error.value).splitlines() == [
        f"{source} -> {config}: the official DN-DETR weights are of another model:",
        "  dilation=True in the file, but False in the model (model.backbone.dc5)",
        f"Use --config-file {config.with_name('dn_detr_r50_dc5_50ep.py')}.",
    ]
    assert not (tmp_path / "converted.pth").exists()


def test_detrex_dc5_is_told_by_its_backbone(tmp_path):
    state = to_detrex(published_state_dict("dn_dab_detr_r50_dc5"), dc5=True)
    torch.save({"model": state, "iteration": 9}, tmp_path / "detrex.pth")
    with pytest.raises(CheckpointError, match="dilation=True in the file"):
        convert(tmp_path / "detrex.pth", tmp_path / "a.pth", "dn_dab_detr_r50")
    table = convert(tmp_path / "detrex.pth", tmp_path / "a.pth", "dn_dab_detr_r50_dc5")
    assert "detrex DN-DETR" in table and "all 80 kept" in table
    assert "does not say with which arguments" in table and "cannot be told" not in table


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.pop("transformer.decoder.layers.2.ca_v_proj.bias"),
            r"missing.*1 \(decoder.layers.2.cross_attn.value.bias\)",
        ),
        (
            lambda s: s.update({"transformer.encoder.norm.weight": torch.ones(256)}),
            r"left over.*1 \(transformer.encoder.norm.weight\)",
        ),
        (
            lambda s: s.update({"backbone.0.body.layer3.6.conv1.weight": torch.ones(1)}),
            r"left over.*1 \(backbone.0.body.layer3.6.conv1.weight\)",
        ),
        (
            lambda s: s.update({"refpoint_embed.weight": torch.ones(100, 4)}),
            r"another shape: 1 \(queries.anchors \(100, 4\) instead of \(300, 4\)\)",
        ),
        (
            lambda s: s.update({"bbox_embed.layers.0.bias": torch.ones(256)}),
            "bbox_embed.layers.0.bias are one tensor in the published models, but differ",
        ),
        (
            lambda s: s.update({"class_embed.weight": torch.ones(21, 256)}),
            "the file has 21 classes, the model 80. Set model.num_classes=21",
        ),
        (lambda s: s.pop("refpoint_embed.weight"), "none of the formats"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused(change, message):
    state = published_state_dict("dn_dab_detr_r50")
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(state, own_state("dn_dab_detr_r50"))


@pytest.mark.parametrize(
    "value, message",
    [
        (float("inf"), "class_embed.bias holds numbers that are not finite"),
        (0.0, r"decoder\.class_embed\.bias and class_embed\.bias are one tensor .*, but differ"),
    ],
)
def test_a_refusal_leaves_the_former_output(tmp_path, value, message):
    state = published_state_dict("dn_dab_detr_r50")
    if value == 0:
        state["transformer.decoder.class_embed.bias"] = state["class_embed.bias"]
    state["class_embed.bias"] = torch.full((91,), value)
    source = save_official(tmp_path / "official.pth", "dn_dab_detr_r50", model=state)
    (tmp_path / "converted.pth").write_text("former")
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "converted.pth", "dn_dab_detr_r50")
    assert (tmp_path / "converted.pth").read_text() == "former"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["converted.pth", "official.pth"]


def test_what_is_no_published_checkpoint_is_refused(tmp_path):
    source = save_official(tmp_path / "official.pth", "dn_dab_detr_r50")
    with pytest.raises(CheckpointError, match="source file itself"):
        convert(source, source, "dn_dab_detr_r50")
    convert(source, tmp_path / "ours.pth", "dn_dab_detr_r50")
    with pytest.raises(CheckpointError, match="of this project already"):
        convert(tmp_path / "ours.pth", tmp_path / "a.pth", "dn_dab_detr_r50")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="no dict of tensors.*epoch"):
        convert(tmp_path / "none.pth", tmp_path / "a.pth", "dn_dab_detr_r50")
    state = {"transformer.pos_trans.weight": torch.ones(512, 512)}
    torch.save({"model": state}, tmp_path / "deformable.pth")
    with pytest.raises(CheckpointError, match="It looks like two-stage Deformable DETR"):
        convert(tmp_path / "deformable.pth", tmp_path / "a.pth", "dn_dab_detr_r50")


def test_tool(tmp_path, monkeypatch, capsys):
    source = save_official(tmp_path / "official.pth", "dn_dab_detr_r50_dc5")
    output = tmp_path / "converted.pth"
    tool = ["tools/convert_checkpoint.py", str(source), str(output), "--config-file"]
    folder = "projects/dn_detr/configs"

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*tool, f"{folder}/dn_detr_r50_50ep.py"])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(tool[0], run_name="__main__")
    said = capsys.readouterr()
    assert status.value.code == 1 and "verified" not in said.out and not output.exists()
    assert said.err.splitlines()[-1] == f"Use --config-file {folder}/dn_detr_r50_dc5_50ep.py."

    done = subprocess.run(
        [sys.executable, *tool, f"{folder}/dn_detr_r50_dc5_50ep.py", "model.num_classes=91"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "verified: loads into the model" in done.stdout and "all 91 kept" in done.stdout
    assert output.exists()
