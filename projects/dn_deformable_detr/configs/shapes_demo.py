"""The demo: a small DN-Deformable-DETR on the built-in shapes, five minutes on two CPU cores."""

from ....configs.common.data.shapes import dataloader, dataset
from ...dn_detr.configs.shapes_demo import lr_multiplier, optimizer, train
from .models.small_dn_deformable_detr import model

optimizer.lr = 5e-4
optimizer.params.lr_factor_func.factor = 4.0

train.max_iter = 1500
train.eval_period = 750
train.output_dir = "./output/deformable_shapes_demo"
