"""DN-DETR-R50-DC5 with 3 patterns, 12 epochs: 41.7 AP (paper, table 2)."""

from .dn_detr_r50_12ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.dc5 = True
model.queries.num_patterns = 3
train.output_dir = "./output/dn_detr_r50_dc5_3pat_12ep"
