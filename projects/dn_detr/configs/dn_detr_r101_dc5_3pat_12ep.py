"""DN-DETR-R101-DC5 with 3 patterns, 12 epochs: 42.8 AP (paper, table 2)."""

from .dn_detr_r50_dc5_3pat_12ep import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "./output/dn_detr_r101_dc5_3pat_12ep"
