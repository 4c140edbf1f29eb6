"""The shipped models, small enough to run many times: their parts, on a narrow backbone."""

from pathlib import Path

import torch

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate

from dn_detr.meta_arch import build_small_resnet

PROJECTS = Path(__file__).parents[2] / "projects"
FAMILIES = {
    "dn_detr": "dn_detr/configs/dn_detr_r50_50ep.py",
    "dn_deformable_detr": "dn_deformable_detr/configs/dn_deformable_detr_r50_50ep.py",
    "dn_deformable_encoder": "dn_deformable_detr/configs/dn_deformable_encoder_r50_50ep.py",
    "dino": "dino/configs/dino_r50_4scale_12ep.py",
    "dn_dino": "dino/configs/dn_dino_r50_36ep.py",
}


def small_config(family):
    """The model of a shipped config with everything narrower; strides 8, 16, 32 (and 64)."""
    model = LazyConfig.load(str(PROJECTS / FAMILIES[family])).model
    channels = [8, 16, 24, 32]
    model.backbone = L(build_small_resnet)(
        channels=channels, blocks=[1] * 4, strides=[1, 2, 2, 2], num_outputs=3, norm="FrozenBN"
    )
    if "in_features" in model.neck:
        model.neck.in_features = dict(res3=16, res4=24, res5=32)
    else:
        model.neck.in_channels = 32
        model.backbone.num_outputs = 1
    model.neck.embed_dim = 32
    model.num_classes = 3
    model.queries.num_queries = 20
    for part in (model.encoder, model.decoder):
        part.update(feedforward_dim=32, num_layers=2, num_heads=4)
    return model


def small_model(family, **changes):
    """The instantiated model, with outputs that differ from query to query."""
    config = small_config(family)
    config.update(changes)
    torch.manual_seed(0)
    model = instantiate(config)
    for name, parameter in model.named_parameters():
        # Published starts give boxes equal to the anchors and attention equal everywhere.
        if any(part in name for part in ("heads", "embed.layers", "offsets.weight")):
            torch.nn.init.normal_(parameter, std=0.2)
    return model
