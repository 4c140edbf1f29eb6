"""DINO-R50, 4 scales, 36 epochs: 50.9 AP (authors' README and paper)."""

from ....configs.common.schedules import lr_multiplier_36ep as lr_multiplier
from .dino_r50_4scale_12ep import dataloader, dataset, model, optimizer, train

train.epochs = 36
train.output_dir = "./output/dino_r50_4scale_36ep"
