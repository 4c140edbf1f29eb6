"""DN-Deformable-DETR-R101, deformable encoder only, 12 epochs: 44.1 AP (paper, table 2)."""

from .dn_deformable_encoder_r50_12ep import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "./output/dn_deformable_encoder_r101_12ep"
