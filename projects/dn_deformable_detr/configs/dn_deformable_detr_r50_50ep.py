"""DN-Deformable-DETR-R50, 50 epochs: 49.5 AP (paper, table 4, "++"; authors' README, "v2")."""

from ....configs.common.data.coco import dataloader, dataset
from ....configs.common.optim import AdamW as optimizer
from ....configs.common.schedules import lr_multiplier_50ep as lr_multiplier
from ....configs.common.train import train
from .models.dn_deformable_detr_r50 import model

train.epochs = 50
train.output_dir = "./output/dn_deformable_detr_r50_50ep"
