"""DN-DETR-R50-DC5, 50 epochs: 46.3 AP (paper, table 1)."""

from .dn_detr_r50_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.dc5 = True
train.output_dir = "./output/dn_detr_r50_dc5_50ep"
