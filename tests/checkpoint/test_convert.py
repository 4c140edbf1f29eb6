"""The converter on files as their authors would have saved them, into the shipped configs."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import instantiate  # noqa: E402

from dn_detr.checkpoint.checkpointer import CheckpointError, DNCheckpointer  # noqa: E402
from dn_detr.checkpoint.coco import COCO_CATEGORIES  # noqa: E402
from dn_detr.checkpoint.convert import convert_file, convert_state_dict  # noqa: E402
from dn_detr.checkpoint.reading import read_checkpoint  # noqa: E402
from dn_detr.engine.config import load_config  # noqa: E402
from tests.checkpoint.published import (  # noqa: E402
    COCO_IDS,
    CONFIGS,
    save_official,
    to_detrex,
)
from tests.golden.seeded import published_state_dict  # noqa: E402

ROOT = Path(__file__).parents[2]
PUBLISHED = {
    "dn_dab_detr_r50": "dn_detr_r50_50ep",
    "dn_dab_detr_r50_dc5": "dn_detr_r50_dc5_50ep",
    "dn_dab_detr_r50_dc5_3pat": "dn_detr_r50_dc5_3pat_12ep",
    "dab_detr_r50": "dab_detr_r50_50ep",
}


def convert(source, output, config: str, *overrides: str) -> str:
    path = str(CONFIGS / f"{config}.py")
    return convert_file(str(source), str(output), load_config(path, list(overrides)), path)


@pytest.fixture(scope="module")
def models():
    """Each config is built once: what a model holds before a conversion does not matter."""
    built = {}

    def build(config: str, num_classes: int = 80):
        if (config, num_classes) not in built:
            cfg = load_config(str(CONFIGS / f"{config}.py"), [f"model.num_classes={num_classes}"])
            built[config, num_classes] = instantiate(cfg.model)
        return built[config, num_classes]

    return build


def test_categories_are_detectron2s():
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES as known

    things = [{"id": c["id"], "name": c["name"]} for c in known if c["isthing"]]
    assert things == list(COCO_CATEGORIES) and [c["id"] for c in things] == COCO_IDS


@pytest.mark.parametrize("variant", PUBLISHED)
def test_official_files_convert_and_load(tmp_path, models, variant):
    config = PUBLISHED[variant]
    source = save_official(tmp_path / "official.pth", variant)
    table = convert(source, tmp_path / "out" / "converted.pth", config)
    assert "80 of 91, by COCO's category ids" in table and "verified" in table
    assert "dilation" in table and "WARNING" not in table
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["converted.pth"]

    model = models(config)
    rest = DNCheckpointer(model).load_weights(
        str(tmp_path / "out" / "converted.pth"), categories=COCO_CATEGORIES, strict=True
    )
    assert rest["metadata"]["categories"] == list(COCO_CATEGORIES)
    assert "num_classes: 80" in rest["metadata"]["config"]
    published, own = published_state_dict(variant), model.state_dict()
    assert own["heads.class_embed.weight"].equal(published["class_embed.weight"][COCO_IDS])
    assert own["heads.class_embed.bias"].equal(published["class_embed.bias"][COCO_IDS])
    if "label_enc.weight" in published:
        labels = published["label_enc.weight"][[*COCO_IDS, 91]]
        assert own["queries.label_embed.weight"].equal(labels)
    assert own["backbone.res4.5.conv3.norm.running_var"].equal(
        published["backbone.0.body.layer3.5.bn3.running_var"]
    )


def test_all_91_rows_are_kept_where_the_config_says_so(tmp_path, models):
    source = save_official(tmp_path / "official.pth", "dn_dab_detr_r50")
    output = tmp_path / "converted.pth"
    assert "all 91 kept" in convert(source, output, "dn_detr_r50_50ep", "model.num_classes=91")
    model = models("dn_detr_r50_50ep", 91)
    DNCheckpointer(model).load_weights(str(output), categories=COCO_CATEGORIES, strict=True)
    published = published_state_dict("dn_dab_detr_r50")
    assert model.heads.class_embed.weight.equal(published["class_embed.weight"])
    assert model.queries.label_embed.weight.equal(published["label_enc.weight"])


@pytest.mark.parametrize(
    "variant, dc5", [("dn_dab_detr_r50", False), ("dn_dab_detr_r50_dc5", True), ("dab_detr_r50", 0)]
)
def test_detrex_files_convert_to_the_same(models, variant, dc5):
    own = models(PUBLISHED[variant]).state_dict()
    published = published_state_dict(variant)
    official = convert_state_dict(published, own).state
    detrex = convert_state_dict(to_detrex(published, dc5), own).state
    assert official.keys() == detrex.keys() == own.keys()
    assert all(detrex[name].equal(official[name]) for name in official)


def test_ddp_prefixes_and_bare_state_dicts(tmp_path):
    state = published_state_dict("dn_dab_detr_r50")
    prefixed = {f"module.{name}": value for name, value in state.items()}
    save_official(tmp_path / "ddp.pth", "dn_dab_detr_r50", model=prefixed)
    convert(tmp_path / "ddp.pth", tmp_path / "a.pth", "dn_detr_r50_50ep")
    torch.save(state, tmp_path / "bare.pth")
    table = convert(tmp_path / "bare.pth", tmp_path / "b.pth", "dn_detr_r50_50ep")
    assert "DC5 weights cannot be told from C5 weights" in table
    a, b = (read_checkpoint(tmp_path / f"{name}.pth")["model"] for name in "ab")
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    "variant, config, message",
    [
        (
            "dn_dab_detr_r50_dc5",
            "dn_detr_r50_50ep",
            r"dilation=True in the file, but False in the model[\s\S]*dn_detr_r50_dc5_50ep\.py",
        ),
        (
            "dn_dab_detr_r50",
            "dn_detr_r50_dc5_50ep",
            r"dilation=False in the file, but True in the model[\s\S]*dn_detr_r50_50ep\.py",
        ),
        (
            "dn_dab_detr_r50_dc5_3pat",
            "dn_detr_r50_dc5_50ep",
            r"num_patterns=3 in the file, but 0[\s\S]*dn_detr_r50_dc5_3pat_12ep\.py",
        ),
        (
            "dn_dab_detr_r50",
            "dn_detr_r101_50ep",
            r"backbone=resnet50 in the file, but resnet101[\s\S]*dn_detr_r50_50ep\.py",
        ),
        ("dn_dab_detr_r50", "shapes_demo", r"nheads=8 in the file, but \(no such part\)"),
        ("dab_detr_r50", "dn_detr_r50_50ep", r"official DAB-DETR.*Use a config dab_detr_"),
        ("dn_dab_detr_r50", "dab_detr_r50_50ep", r"official DN-DETR.*Use a config dn_detr_"),
    ],
)
def test_another_model_is_refused(tmp_path, variant, config, message):
    source = save_official(tmp_path / "official.pth", variant)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "converted.pth", config)
    assert not (tmp_path / "converted.pth").exists()


def test_arguments_that_no_name_shows_are_compared(tmp_path):
    source = save_official(tmp_path / "official.pth", "dn_dab_detr_r50")
    for override, message in (
        ("model.neck.position_encoding.temperature=10000", "pe_temperatureH=20 .*10000"),
        ("model.encoder.num_heads=4", "nheads=8 .*4 in the model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "converted.pth", "dn_detr_r50_50ep", override)


def test_detrex_dc5_is_told_by_its_backbone(tmp_path):
    state = to_detrex(published_state_dict("dn_dab_detr_r50_dc5"), dc5=True)
    torch.save({"model": state, "iteration": 9}, tmp_path / "detrex.pth")
    with pytest.raises(CheckpointError, match="dilation=True in the file"):
        convert(tmp_path / "detrex.pth", tmp_path / "a.pth", "dn_detr_r50_50ep")
    table = convert(tmp_path / "detrex.pth", tmp_path / "a.pth", "dn_detr_r50_dc5_50ep")
    assert "detrex DN-DETR" in table and "all 80 kept" in table
    assert "does not say with which arguments" in table and "cannot be told" not in table


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
        (
            lambda s: s.update({"class_embed.bias": torch.full((91,), float("inf"))}),
            "not finite",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, message):
    state = published_state_dict("dn_dab_detr_r50")
    change(state)
    source = save_official(tmp_path / "official.pth", "dn_dab_detr_r50", model=state)
    (tmp_path / "converted.pth").write_text("former")
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "converted.pth", "dn_detr_r50_50ep")
    assert (tmp_path / "converted.pth").read_text() == "former"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["converted.pth", "official.pth"]


def test_what_is_no_published_checkpoint_is_refused(tmp_path):
    source = save_official(tmp_path / "official.pth", "dn_dab_detr_r50")
    with pytest.raises(CheckpointError, match="source file itself"):
        convert(source, source, "dn_detr_r50_50ep")
    convert(source, tmp_path / "ours.pth", "dn_detr_r50_50ep")
    with pytest.raises(CheckpointError, match="of this project already"):
        convert(tmp_path / "ours.pth", tmp_path / "a.pth", "dn_detr_r50_50ep")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="no dict of tensors.*epoch"):
        convert(tmp_path / "none.pth", tmp_path / "a.pth", "dn_detr_r50_50ep")
    state = {"transformer.level_embed": torch.ones(4, 256)}
    torch.save({"model": state}, tmp_path / "deformable.pth")
    with pytest.raises(CheckpointError, match="looks like a deformable model"):
        convert(tmp_path / "deformable.pth", tmp_path / "a.pth", "dn_detr_r50_50ep")


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
