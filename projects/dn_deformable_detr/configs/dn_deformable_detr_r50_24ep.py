"""DN-Deformable-DETR-R50, 24 epochs: 48.4 AP (authors' README; 25 epochs in the paper).

The epoch of the drop is not published; it is DINO's here, 20.
"""

from ....configs.common.schedules import lr_multiplier_24ep as lr_multiplier
from .dn_deformable_detr_r50_50ep import dataloader, dataset, model, optimizer, train

train.epochs = 24
train.output_dir = "./output/dn_deformable_detr_r50_24ep"
