"""COCO 2017, or any other set in COCO format: override dataset.{train,val}.{json,images}."""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.data import transforms as T
from omegaconf import OmegaConf

from dn_detr.data.augmentation import RandomChoice, ResizeShortestEdge
from dn_detr.data.datasets import detection_dicts
from dn_detr.data.loader import build_train_loader
from dn_detr.data.mapper import DetrDatasetMapper
from dn_detr.evaluation.evaluator import build_evaluator

dataset = OmegaConf.create(
    dict(
        root="${oc.env:DETECTRON2_DATASETS,./datasets}/coco",
        train=dict(
            json="${dataset.root}/annotations/instances_train2017.json",
            images="${dataset.root}/train2017",
        ),
        val=dict(
            json="${dataset.root}/annotations/instances_val2017.json",
            images="${dataset.root}/val2017",
        ),
    )
)

# DETR's: sides of the shorter edge are 480, 512, ..., 800.
_resize = L(ResizeShortestEdge)(
    short_edge_length=list(range(480, 801, 32)), max_size=1333, sample_style="choice"
)
_crop = [
    # DETR sets no limit here: a 1x5000 image would grow to 400x2000000. COCO's longest is 7200.
    L(ResizeShortestEdge)(short_edge_length=[400, 500, 600], max_size=10000, sample_style="choice"),
    # Height and width each uniform in [384, min(600, side)], as in DETR's RandomSizeCrop.
    L(T.RandomCrop)(crop_type="absolute_range", crop_size=[384, 600]),
]

dataloader = OmegaConf.create()
dataloader.train = L(build_train_loader)(
    dataset=L(detection_dicts)(
        json="${dataset.train.json}",
        images="${dataset.train.images}",
        num_classes="${model.num_classes}",
    ),
    mapper=L(DetrDatasetMapper)(
        is_train=True,
        augmentations=[
            L(T.RandomFlip)(prob=0.5, horizontal=True),
            L(RandomChoice)(choices=[_resize, L(T.AugmentationList)(augs=[*_crop, _resize])]),
        ],
        image_format="RGB",
    ),
    total_batch_size=16,
    aspect_ratio_grouping=False,
    on_bad_image="error",  # "skip": take another, as long as it is one in a hundred
    seed="${train.seed}",
    num_workers=4,
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(detection_dicts)(
        json="${dataset.val.json}",
        images="${dataset.val.images}",
        num_classes="${model.num_classes}",
    ),
    mapper=L(DetrDatasetMapper)(
        is_train=False,
        augmentations=[L(ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="RGB",
    ),
    batch_size=1,
    num_workers=4,
)
dataloader.evaluator = L(build_evaluator)(
    json="${dataset.val.json}",
    images="${dataset.val.images}",
    num_classes="${model.num_classes}",
    output_dir="${train.output_dir}/inference",
)
