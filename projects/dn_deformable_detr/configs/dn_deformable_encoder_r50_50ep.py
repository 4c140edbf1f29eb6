"""DN-Deformable-DETR-R50, deformable encoder only, 50 epochs: 48.6 AP (paper, table 4).

Published with 16 GPUs, one image each: a step needs much memory.
"""

from ....configs.common.data.coco import dataloader, dataset
from ....configs.common.optim import AdamW as optimizer
from ....configs.common.schedules import lr_multiplier_50ep as lr_multiplier
from ....configs.common.train import train
from .models.dn_deformable_encoder_r50 import model

train.epochs = 50
train.output_dir = "./output/dn_deformable_encoder_r50_50ep"
