"""Published weights and models of other configs, without their numbers."""

from functools import cache

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import instantiate  # noqa: E402

from dn_detr.checkpoint import fitting  # noqa: E402
from dn_detr.checkpoint.fitting import check_same_model, find_remedy  # noqa: E402
from dn_detr.checkpoint.formats import FORMATS  # noqa: E402
from dn_detr.checkpoint.state_dicts import OtherModelError, convert_state_dict  # noqa: E402
from dn_detr.engine.config import load_config  # noqa: E402
from tests.checkpoint.published import (  # noqa: E402
    PROJECTS,
    PUBLISHED,
    config_of,
    official_arguments,
)
from tests.checkpoint.test_formats import empty_state  # noqa: E402

V2, PORT = "dn_dab_deformable_detr_r50", "dn_dab_dino_deformable_detr_r50"
ENCODER_ONLY = "dn_dab_deformable_detr_deformable_encoder_only_r50"
DN, DEFORMABLE, DINO = (
    PROJECTS / name / "configs" for name in ("dn_detr", "dn_deformable_detr", "dino")
)


@cache
def build(config, *overrides):
    """The model of a config with 80 classes, without weights."""
    cfg = load_config(str(config), ["model.num_classes=80", *overrides])
    with torch.device("meta"):
        return instantiate(cfg.model)


def arguments_of(variant, **changes):
    arguments = {} if "detrex" in variant else vars(official_arguments(variant))
    return {**arguments, **changes}


def refusal(variant, config, *overrides, change=None, **changed_arguments):
    """What a user reads, the remedy last."""
    model, known = build(config, *overrides), FORMATS[PUBLISHED[variant][0]]
    published, arguments = empty_state(variant), arguments_of(variant, **changed_arguments)
    if change:
        change(published)
    with pytest.raises(OtherModelError) as error:
        check_same_model(published, arguments, model, known)
        convert_state_dict(published, model.state_dict())
    return f"{error.value}\n{find_remedy(published, arguments, known, 80, str(config))}"


@pytest.fixture(autouse=True)
def without_numbers(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "equal", lambda a, b: a.shape == b.shape)


@pytest.fixture
def built_once(monkeypatch):
    monkeypatch.setattr(fitting, "_build_without_weights", lambda path, _: build(path.resolve()))


@pytest.mark.parametrize("variant", PUBLISHED)
def test_every_published_model_fits_its_config(variant):
    model = build(config_of(variant))
    known = FORMATS[PUBLISHED[variant][0]]
    compared = check_same_model(empty_state(variant), arguments_of(variant), model, known)
    assert bool(compared) != variant.startswith("detrex")
    assert "dilation" in compared or not compared
    assert not known.without_effect.intersection(compared)
    state = convert_state_dict(empty_state(variant), model.state_dict()).state
    own = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == own


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize(
    "variant, config, line, remedy",
    [
        (
            "dn_dab_detr_r50_dc5",
            DN / "dn_detr_r50_50ep.py",
            "dilation=True in the file, but False in the model (model.backbone.dc5)",
            [DN / "dn_detr_r50_dc5_50ep.py"],
        ),
        (
            "dn_dab_detr_r50",
            DN / "dn_detr_r50_dc5_50ep.py",
            "dilation=False in the file, but True in the model",
            [DN / "dn_detr_r50_12ep.py", DN / "dn_detr_r50_50ep.py"],
        ),
        (
            "dn_dab_detr_r50_dc5_3pat",
            DN / "dn_detr_r50_dc5_50ep.py",
            "num_patterns=3 in the file, but 0 in the model",
            [DN / "dn_detr_r50_dc5_3pat_12ep.py"],
        ),
        (
            "dn_dab_detr_r50",
            DN / "dn_detr_r101_50ep.py",
            "backbone=resnet50 in the file, but resnet101 in the model",
            [DN / "dn_detr_r50_12ep.py", DN / "dn_detr_r50_50ep.py"],
        ),
        (
            "dab_detr_r50",
            DN / "dn_detr_r50_50ep.py",
            "official DAB-DETR weights are of another model:\n"
            "  only in the model: queries.label_embed",
            [DN / "dab_detr_r50_50ep.py"],
        ),
        (
            "dn_dab_detr_r50",
            DN / "dab_detr_r50_50ep.py",
            "only in the file, by the names here: queries.label_embed",
            [DN / "dn_detr_r50_12ep.py", DN / "dn_detr_r50_50ep.py"],
        ),
        (
            V2,
            DEFORMABLE / "dab_deformable_detr_r50_50ep.py",
            "only in the file, by the names here: queries.label_embed",
            [DEFORMABLE / f"dn_deformable_detr_r50_{n}ep.py" for n in (12, 24, 50)],
        ),
        (
            V2,
            DN / "dn_detr_r50_50ep.py",
            "only in the model: decoder.layers.N.cross_attn.key_content",
            [DEFORMABLE / f"dn_deformable_detr_r50_{n}ep.py" for n in (12, 24, 50)],
        ),
        (
            ENCODER_ONLY,
            DEFORMABLE / "dn_deformable_encoder_r101_12ep.py",
            "backbone=resnet50 in the file, but resnet101 in the model",
            [DEFORMABLE / f"dn_deformable_encoder_r50_{n}ep.py" for n in (12, 50)],
        ),
        (
            ENCODER_ONLY.replace("r50", "r101"),
            DEFORMABLE / "dn_deformable_detr_r50_50ep.py",
            "only in the file, by the names here: decoder.layers.N.cross_attn.key_content",
            [DEFORMABLE / "dn_deformable_encoder_r101_12ep.py"],
        ),
        (
            "dab_deformable_detr_r50",
            DEFORMABLE / "dn_deformable_detr_r50_50ep.py",
            "only in the model: queries.label_embed",
            [DEFORMABLE / "dab_deformable_detr_r50_50ep.py"],
        ),
        (
            PORT,
            DINO / "dino_r50_4scale_12ep.py",
            "num_queries=300 in the file, but 900 in the model (model.queries.num_queries)",
            [DINO / "dn_dino_r50_36ep.py"],
        ),
        (
            "dino_r50_4scale",
            DINO / "dino_detrex_r50_4scale_12ep.py",
            "pe_temperatureH=20 in the file, but 10000 in the model",
            [DINO / f"dino_r50_4scale_{n}ep.py" for n in (12, 24, 36)],
        ),
        (
            "dino_r50_4scale",
            DEFORMABLE / "dn_deformable_detr_r50_50ep.py",
            "two_stage_type=standard in the file, but no in the model (model.queries)",
            [DINO / f"dino_r50_4scale_{n}ep.py" for n in (12, 24, 36)],
        ),
        (
            "detrex_dino_r50_4scale",
            DINO / "dino_r50_4scale_12ep.py",
            "only in the file, by the names here: heads.bbox_embed.N.layers.N, heads.class_embed.N",
            [DINO / "dino_detrex_r50_4scale_12ep.py"],
        ),
        (
            "detrex_dn_deformable_detr_r50",
            DN / "dab_detr_r50_50ep.py",
            "detrex DN-Deformable-DETR weights are of another model",
            [DEFORMABLE / f"dn_deformable_detr_r50_{n}ep.py" for n in (12, 24, 50)],
        ),
    ],
)
def test_another_model_is_refused_and_the_right_one_named(variant, config, line, remedy):
    text = refusal(variant, config)
    assert line in text
    assert text.endswith(f"\nUse --config-file {' or '.join(map(str, remedy))}.")


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize(
    "variant, override, line",
    [
        (
            "dn_dab_detr_r50",
            "model.neck.position_encoding.temperature=10000",
            "pe_temperatureH=20 in the file, but 10000 in the model "
            "(model.neck.position_encoding.temperature)",
        ),
        (
            "dn_dab_detr_r50",
            "model.decoder.num_heads=4",
            "nheads=8 in the file, but 8 and 4 in the model "
            "(model.encoder.num_heads and model.decoder.num_heads)",
        ),
        (
            ENCODER_ONLY,
            "model.encoder.activation=gelu",
            "transformer_activation=relu in the file, but gelu and relu in the model",
        ),
        (
            ENCODER_ONLY,
            "model.neck.position_encoding.temperature=10000",
            "pe_temperatureW=20 in the file, but 10000 in the model",
        ),
        (
            V2,
            "model.encoder.num_points=2",
            "enc_n_points=4 in the file, but 2 in the model (model.encoder.num_points)",
        ),
        (
            "dino_r50_4scale",
            "model.decoder.num_points=8",
            "dec_n_points=4 in the file, but 8 in the model (model.decoder.num_points)",
        ),
        (
            "dino_r50_4scale",
            "model.neck.num_levels=5",
            "num_feature_levels=4 in the file, but 5 in the model (model.neck.num_levels)",
        ),
        (V2, "model.queries.num_queries=100", "num_queries=300 in the file, but 100 in the model"),
    ],
)
def test_what_an_override_breaks_is_named(variant, override, line):
    config = config_of(variant)
    text = refusal(variant, config, override)
    assert line in text
    assert text.endswith(f"\nIt fits {config} as that is: leave out what you override.")


@pytest.mark.parametrize("variant", [V2, PORT])
def test_arguments_that_a_model_does_not_look_at_are_left_out(variant):
    model, known = build(config_of(variant)), FORMATS[PUBLISHED[variant][0]]
    assert type(model.encoder.layers[0].ffn.activation) is torch.nn.ReLU
    for activation in ("prelu", "relu"):
        arguments = arguments_of(variant, transformer_activation=activation, pe_temperatureH=1)
        assert check_same_model(empty_state(variant), arguments, model, known)


def five_levels(state):
    state["transformer.level_embed"] = torch.empty(5, 256, device="meta")
    for part in ("0.weight", "0.bias", "1.weight", "1.bias"):
        state[f"input_proj.4.{part}"] = state[f"input_proj.3.{part}"]


def swin(state):
    for name in [name for name in state if name.startswith("backbone.")]:
        del state[name]
    state["backbone.0.patch_embed.proj.weight"] = torch.empty(192, 3, 4, 4, device="meta")
    state["backbone.0.layers.0.blocks.0.norm1.weight"] = torch.empty(192, device="meta")


def incomplete(state):
    for name in [name for name in state if name.endswith("layers.2.norm3.bias")]:
        del state[name]


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize(
    "change, arguments, lines",
    [
        (
            five_levels,
            {"num_feature_levels": 5},
            ["num_feature_levels=5 in the file, but 4 in the model (model.neck.num_levels)"],
        ),
        (
            five_levels,
            {},
            [
                "left over, by the names in the file: 4 (input_proj.4.0.bias, ",
                "of another shape: 1 (neck.level_embed (5, 256) instead of (4, 256))",
            ],
        ),
        (
            swin,
            {"backbone": "swin_L_384_22k"},
            [
                "backbone=swin_L_384_22k in the file, but resnet50 in the model",
                "the backbone in the file is no ResNet: backbone.0.layers.0.blocks.0.norm1.weight",
            ],
        ),
        (
            incomplete,
            {},
            ["missing, by the names here: 1 (decoder.layers.2.norm3.bias)"],
        ),
    ],
)
def test_what_no_config_fits_is_refused(change, arguments, lines):
    config = config_of("dino_r50_4scale")
    text = refusal("dino_r50_4scale", config, change=change, **arguments)
    for line in lines:
        assert line in text
    assert "\nNone of the configs dino_r*.py fits. Set what stands in brackets" in text


def test_configs_are_found_beside_a_relative_path(monkeypatch):
    known, published = FORMATS["dab_detr"], empty_state("dab_detr_r50")
    for folder, config, expected in (
        (PROJECTS, "dino/configs/x.py", "dn_detr/configs/dab_detr_r50_50ep.py"),
        (DN, "x.py", "dab_detr_r50_50ep.py"),
    ):
        monkeypatch.chdir(folder)
        arguments = vars(official_arguments("dab_detr_r50"))
        remedy = find_remedy(published, arguments, known, 80, config)
        assert f" {expected}" in remedy


def test_a_broken_config_beside_is_no_hindrance(tmp_path, caplog):
    (tmp_path / "dab_detr_r50_mine.py").write_text("nonsense\n")
    known, published = FORMATS["dab_detr"], empty_state("dab_detr_r50")
    text = find_remedy(published, None, known, 80, str(tmp_path / "x.py"))
    assert text.startswith("None of the configs dab_detr_r*.py fits.")
    assert "dab_detr_r50_mine.py cannot be tried" in caplog.text
