"""DINO-R50, 4 scales, 12 epochs: 49.0 AP (authors' README; paper, table 1: 47.9)."""

from ....configs.common.data.coco import dataloader, dataset
from ....configs.common.optim import AdamW as optimizer
from ....configs.common.schedules import lr_multiplier_12ep as lr_multiplier
from ....configs.common.train import train
from .models.dino_r50 import model

train.epochs = 12
train.output_dir = "./output/dino_r50_4scale_12ep"
