"""DN-DETR-R50, 12 epochs.

Neither paper nor authors report it; Group DETR quotes 38.5 AP (detrex #120).
"""

from ....configs.common.schedules import lr_multiplier_12ep as lr_multiplier
from .dn_detr_r50_50ep import dataloader, dataset, model, optimizer, train

train.epochs = 12
train.output_dir = "./output/dn_detr_r50_12ep"
