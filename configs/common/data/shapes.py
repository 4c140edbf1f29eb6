"""The built-in shapes data, made where it is missing (dn_detr/data/shapes.py)."""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from dn_detr.data.augmentation import RandomTranspose
from dn_detr.data.shapes import generate_shapes

from .coco import dataloader, dataset

dataset.root = "${oc.env:DETECTRON2_DATASETS,./datasets}/shapes"
dataset.generate = L(generate_shapes)(
    root="${dataset.root}",
    size=128,
    num_train=3000,
    num_val=300,
    classes=["circle", "square", "triangle", "star", "ring"],
    objects=[1, 6],
    shape_size=None,
    seed=0,
)
for _split in ("train", "val"):
    dataset[_split].json = f"${{dataset.root}}/{_split}.json"
    dataset[_split].images = f"${{dataset.root}}/{_split}"

# A mirrored or turned shape is as good a shape, and all images have one size.
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(prob=0.5, horizontal=True),
    L(T.RandomFlip)(prob=0.5, horizontal=False, vertical=True),
    L(RandomTranspose)(prob=0.5),
]
dataloader.train.total_batch_size = 8
# Reading small images takes less than a worker would take from the training on few cores.
dataloader.train.num_workers = 0
dataloader.test.mapper.augmentations = []
dataloader.test.num_workers = 0
