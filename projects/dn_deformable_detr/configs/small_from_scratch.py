"""A small DN-Deformable-DETR from scratch on some hundred images of one's own.

Half an hour on two CPU cores. Name the data: dataset.train.json=... dataset.train.images=...
dataset.val.json=... dataset.val.images=...
"""

from ...dn_detr.configs.small_from_scratch import dataloader, dataset, train
from .models.small_dn_deformable_detr import model
from .shapes_demo import lr_multiplier, optimizer

model.backbone.update(strides=[1, 2, 2], num_outputs=2)
model.neck.in_features = dict(res3=64, res4=128)  # strides 8 and 16: 40 x 30 and 20 x 15 tokens
model.queries.num_queries = 100

train.output_dir = "./output/deformable_small_from_scratch"
