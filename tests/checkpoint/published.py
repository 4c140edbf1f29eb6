"""Files as their authors would have saved them, with seeded weights (tests/golden)."""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from tests.golden import seeded

COCO_IDS = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]
PROJECTS = Path(__file__).parents[2] / "projects"

# Published model -> (key of its format, the config it fits, in projects/).
PUBLISHED = {
    "dn_dab_detr_r50": ("dn_detr", "dn_detr/configs/dn_detr_r50_50ep"),
    "dn_dab_detr_r50_dc5": ("dn_detr", "dn_detr/configs/dn_detr_r50_dc5_50ep"),
    "dn_dab_detr_r50_dc5_3pat": ("dn_detr", "dn_detr/configs/dn_detr_r50_dc5_3pat_12ep"),
    "dn_dab_detr_r101_dc5_3pat": ("dn_detr", "dn_detr/configs/dn_detr_r101_dc5_3pat_12ep"),
    "dab_detr_r50": ("dab_detr", "dn_detr/configs/dab_detr_r50_50ep"),
    "dn_dab_deformable_detr_r50": (
        "dn_deformable_detr",
        "dn_deformable_detr/configs/dn_deformable_detr_r50_50ep",
    ),
    "dn_dab_deformable_detr_deformable_encoder_only_r50": (
        "dn_deformable_encoder",
        "dn_deformable_detr/configs/dn_deformable_encoder_r50_50ep",
    ),
    "dn_dab_deformable_detr_deformable_encoder_only_r101": (
        "dn_deformable_encoder",
        "dn_deformable_detr/configs/dn_deformable_encoder_r101_12ep",
    ),
    "dab_deformable_detr_r50": (
        "dab_deformable_detr",
        "dn_deformable_detr/configs/dab_deformable_detr_r50_50ep",
    ),
    "dn_dab_dino_deformable_detr_r50": ("dn_dino", "dino/configs/dn_dino_r50_36ep"),
    "dino_r50_4scale": ("dino", "dino/configs/dino_r50_4scale_12ep"),
    "detrex_dn_detr_r50": ("detrex_dn_detr", "dn_detr/configs/dn_detr_r50_50ep"),
    "detrex_dn_deformable_detr_r50": (
        "detrex_dn_deformable_detr",
        "dn_deformable_detr/configs/dn_deformable_detr_r50_50ep",
    ),
    "detrex_dab_deformable_detr_r50": (
        "detrex_dab_deformable_detr",
        "dn_deformable_detr/configs/dab_deformable_detr_r50_50ep",
    ),
    "detrex_dino_r50_4scale": ("detrex_dino", "dino/configs/dino_detrex_r50_4scale_12ep"),
}

_LAYERS = {
    r"(layers\.\d)\.linear1": r"\1.ffns.0.layers.0.0",
    r"(layers\.\d)\.activation": r"\1.ffns.0.layers.0.1",
    r"(layers\.\d)\.linear2": r"\1.ffns.0.layers.1",
}
# Official name -> detrex's, of everything but the backbone (checked against detrex's own lists).
_DETREX = {
    r"refpoint_embed": "anchor_box_embed",
    r"label_enc": "denoising_generator.label_encoder",
    r"decoder\.norm": "decoder.post_norm_layer",
    r"(encoder\.layers\.\d)\.self_attn": r"\1.attentions.0.attn",
    r"(decoder\.layers\.\d)\.self_attn\.": r"\1.attentions.0.",
    r"(decoder\.layers\.\d)\.cross_attn\.": r"\1.attentions.1.",
    r"\.sa_q": ".attentions.0.query_",
    r"\.sa_k": ".attentions.0.key_",
    r"\.sa_v_": ".attentions.0.value_",
    r"\.ca_q": ".attentions.1.query_",
    r"\.ca_k": ".attentions.1.key_",
    r"\.ca_v_": ".attentions.1.value_",
    **_LAYERS,
    r"(layers\.\d)\.norm1": r"\1.norms.0",
    r"(layers\.\d)\.norm2": r"\1.norms.1",
    r"(layers\.\d)\.norm3": r"\1.norms.2",
}
# As projects/dn_deformable_detr/converter.py of detrex has it, and beyond it for DINO.
_DETREX_DEFORMABLE = {
    r"input_proj\.3\.0": "neck.extra_convs.0.conv",
    r"input_proj\.3\.1": "neck.extra_convs.0.norm",
    r"input_proj\.(\d)\.0": r"neck.convs.\1.conv",
    r"input_proj\.(\d)\.1": r"neck.convs.\1.norm",
    r"level_embed": "level_embeds",
    r"(encoder\.layers\.\d)\.self_attn": r"\1.attentions.0",
    r"(decoder\.layers\.\d)\.self_attn": r"\1.attentions.0.attn",
    r"(decoder\.layers\.\d)\.cross_attn": r"\1.attentions.1",
    **_LAYERS,
    r"(encoder\.layers\.\d)\.norm1": r"\1.norms.0",
    r"(encoder\.layers\.\d)\.norm2": r"\1.norms.1",
    r"(decoder\.layers\.\d)\.norm1": r"\1.norms.1",
    r"(decoder\.layers\.\d)\.norm2": r"\1.norms.0",
    r"(decoder\.layers\.\d)\.norm3": r"\1.norms.2",
    r"transformer\.enc_out_(class_embed|bbox_embed)": r"\1.6",
}


def config_of(variant: str) -> Path:
    """The config that a published model fits."""
    return PROJECTS / f"{PUBLISHED[variant][1]}.py"


def official_arguments(variant: str) -> argparse.Namespace:
    """What the published main.py saves, as far as it says how the model is built.

    All arguments of a repository are saved, whether the model looks at them or not.
    """
    arguments = dict(
        modelname=re.split("_r(50|101)", variant)[0],
        backbone="resnet101" if "r101" in variant else "resnet50",
        dilation="dc5" in variant,
        num_patterns=3 if "3pat" in variant or "encoder_only" in variant else 0,
        num_queries=300,
        pe_temperatureH=20,
        pe_temperatureW=20,
        transformer_activation="relu" if "encoder_only" in variant else "prelu",
        nheads=8,
        hidden_dim=256,
        enc_layers=6,
        dec_layers=6,
        dim_feedforward=2048,
        num_feature_levels=4,
        enc_n_points=4,
        dec_n_points=4,
        two_stage="dab_dino" in variant,
        lr=1e-4,
        backbone_freeze_keywords=None,
        output_dir="logs/R50",
    )
    if variant == "dino_r50_4scale":
        del arguments["two_stage"]
        arguments.update(two_stage_type="standard", num_queries=900, num_select=300)
        arguments.update(transformer_activation="relu", dn_labelbook_size=91)
    return argparse.Namespace(**arguments)


def save_official(path: Path, variant: str, **changes) -> Path:
    """A file of the published training script; `changes` replace entries of it."""
    data = {
        "model": seeded.published_state_dict(variant),
        "optimizer": {"param_groups": [{"lr": 1e-4}], "state": {}},
        "epoch": 49,
        "args": official_arguments(variant),
        **changes,
    }
    torch.save({key: value for key, value in data.items() if value is not None}, path)
    return path


def to_detrex(official: dict[str, Tensor], dc5: bool = False) -> dict[str, Tensor]:
    """The same model as detrex names it, with 80 classes."""
    state = {}
    dino = "transformer.enc_output.weight" in official
    for name, value in official.items():
        if "class_embed" in name:
            value = value[COCO_IDS]
        elif name == "label_enc.weight":
            value = value[COCO_IDS if dino else [*COCO_IDS, 91]]
        if name.startswith("backbone."):
            name = name.replace("backbone.0.body.", "backbone.body.")
            name = name if dc5 else _detectron2_backbone(name)
        else:
            name = _detrex_name(name, "transformer.level_embed" in official, dino)
        state[name] = value
        if name.endswith("ffns.0.layers.0.1.weight"):
            state[name.replace("layers.0.1.weight", "activation.weight")] = value
        if re.match(r"(class|bbox)_embed\.6", name):
            state[f"transformer.decoder.{name}"] = value
    return state


def _detrex_name(name: str, deformable: bool, dino: bool) -> str:
    rules = _DETREX_DEFORMABLE if deformable else _DETREX
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    labels = deformable and not dino
    return name.replace("label_enc.", "denoising_generator.label_encoder.") if labels else name


def _detectron2_backbone(name: str) -> str:
    name = name.replace("backbone.body.", "")
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return f"backbone.{name}"
