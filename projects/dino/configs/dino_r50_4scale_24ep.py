"""DINO-R50, 4 scales, 24 epochs: 50.4 AP (authors' README and paper)."""

from ....configs.common.schedules import lr_multiplier_24ep as lr_multiplier
from .dino_r50_4scale_12ep import dataloader, dataset, model, optimizer, train

train.epochs = 24
train.output_dir = "./output/dino_r50_4scale_24ep"
