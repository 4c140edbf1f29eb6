"""DN-DETR-R101, 50 epochs: 45.2 AP (paper, table 1)."""

from .dn_detr_r50_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "./output/dn_detr_r101_50ep"
