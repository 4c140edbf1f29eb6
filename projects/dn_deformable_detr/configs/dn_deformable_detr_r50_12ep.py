"""DN-Deformable-DETR-R50, 12 epochs: 46.0 AP (extended paper, "++")."""

from ....configs.common.schedules import lr_multiplier_12ep as lr_multiplier
from .dn_deformable_detr_r50_50ep import dataloader, dataset, model, optimizer, train

train.epochs = 12
train.output_dir = "./output/dn_deformable_detr_r50_12ep"
