"""DN-DETR-R101-DC5, 50 epochs: 47.3 AP (paper, table 1)."""

from .dn_detr_r101_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.dc5 = True
train.output_dir = "./output/dn_detr_r101_dc5_50ep"
