"""Files as their authors would have saved them, with seeded weights (tests/golden)."""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from tests.golden import seeded

COCO_IDS = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]
CONFIGS = Path(__file__).parents[2] / "projects" / "dn_detr" / "configs"

# Official name -> detrex's, of everything but the backbone (checked against detrex's own list).
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
    r"(layers\.\d)\.linear1": r"\1.ffns.0.layers.0.0",
    r"(layers\.\d)\.activation": r"\1.ffns.0.layers.0.1",
    r"(layers\.\d)\.linear2": r"\1.ffns.0.layers.1",
    r"(layers\.\d)\.norm1": r"\1.norms.0",
    r"(layers\.\d)\.norm2": r"\1.norms.1",
    r"(layers\.\d)\.norm3": r"\1.norms.2",
}


def official_arguments(variant: str) -> argparse.Namespace:
    """What the published main.py saves, as far as it says how the model is built."""
    return argparse.Namespace(
        modelname=variant.rsplit("_r50")[0],
        backbone="resnet50",
        dilation="dc5" in variant,
        num_patterns=3 if "3pat" in variant else 0,
        num_queries=300,
        pe_temperatureH=20,
        pe_temperatureW=20,
        transformer_activation="prelu",
        nheads=8,
        hidden_dim=256,
        enc_layers=6,
        dec_layers=6,
        dim_feedforward=2048,
        lr=1e-4,
        backbone_freeze_keywords=None,
        output_dir="logs/R50",
    )


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


def to_detrex(official: dict[str, Tensor], dc5: bool) -> dict[str, Tensor]:
    """The same model as detrex names it, with 80 classes."""
    state = {}
    for name, value in official.items():
        if name.startswith("backbone."):
            name = name.replace("backbone.0.body.", "backbone.body.")
            name = name if dc5 else _detectron2_backbone(name)
        else:
            for pattern, replacement in _DETREX.items():
                name = re.sub(pattern, replacement, name)
        if name.startswith("class_embed"):
            value = value[COCO_IDS]
        elif "label_encoder" in name:
            value = value[[*COCO_IDS, 91]]
        state[name] = value
        if name.endswith("ffns.0.layers.0.1.weight"):
            state[name.replace("layers.0.1.weight", "activation.weight")] = value
    return state


def _detectron2_backbone(name: str) -> str:
    name = name.replace("backbone.body.", "")
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return f"backbone.{name}"
