"""DN-Deformable-DETR-R50, deformable encoder only, 12 epochs: 43.4 AP (paper, table 2)."""

from ....configs.common.schedules import lr_multiplier_12ep as lr_multiplier
from .dn_deformable_encoder_r50_50ep import dataloader, dataset, model, optimizer, train

train.epochs = 12
train.output_dir = "./output/dn_deformable_encoder_r50_12ep"
