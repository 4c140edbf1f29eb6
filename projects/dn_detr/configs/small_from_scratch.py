"""A small DN-DETR from scratch on some hundred images of one's own: half an hour on two CPU cores.

Name the data: dataset.train.json=... dataset.train.images=...
dataset.val.json=... dataset.val.images=...
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from dn_detr.data.augmentation import ResizeShortestEdge

from ....configs.common.data.coco import dataloader, dataset
from .models.small_dn_detr import model
from .shapes_demo import lr_multiplier, optimizer, train

model.backbone.strides = [1, 2, 2]  # stride 16: 20 x 15 tokens an image
model.queries.num_queries = 100

dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(prob=0.5, horizontal=True),
    L(T.RandomFlip)(prob=0.5, horizontal=False, vertical=True),
    L(ResizeShortestEdge)(
        short_edge_length=[208, 224, 240, 256, 272], max_size=400, sample_style="choice"
    ),
]
dataloader.test.mapper.augmentations = [L(ResizeShortestEdge)(short_edge_length=240, max_size=400)]
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 1
dataloader.test.num_workers = 1

train.max_iter = 1500
train.output_dir = "./output/small_from_scratch"
