"""DN-DETR with ResNet-50.

DN-DAB-DETR; https://github.com/IDEA-Research/DN-DETR, models/DN_DAB_DETR.
"""

from detectron2.config import LazyCall as L

from dn_detr.denoising import DenoisingGenerator
from dn_detr.layers import SinePositionEncoding
from dn_detr.meta_arch import DNDETR, build_resnet
from dn_detr.modeling import (
    AnchorQueries,
    DABDecoder,
    DABEncoder,
    DetectionHeads,
    HungarianMatcher,
    SetCriterion,
    SingleLevelNeck,
)

model = L(DNDETR)(
    num_classes=None,  # null: from the data; 91: classes are COCO category ids, as published
    backbone=L(build_resnet)(
        depth=50,
        dc5=False,
        freeze_at=2,
        out_features=["res5"],
        activation_checkpointing=False,
    ),
    neck=L(SingleLevelNeck)(
        in_feature="res5",
        in_channels=2048,
        embed_dim=256,
        position_encoding=L(SinePositionEncoding)(embed_dim="${..embed_dim}", temperature=20),
        exact_mask=False,  # as published; True: padded images have the coordinates they have alone
    ),
    encoder=L(DABEncoder)(
        embed_dim="${..neck.embed_dim}",
        num_heads=8,
        feedforward_dim=2048,
        num_layers=6,
        activation="prelu",
        activation_checkpointing=False,
    ),
    queries=L(AnchorQueries)(
        num_queries=300,
        embed_dim="${..neck.embed_dim}",
        num_classes="${..num_classes}",
        num_patterns=0,
        content="unknown_label",
    ),
    decoder=L(DABDecoder)(
        embed_dim="${..neck.embed_dim}",
        num_heads=8,
        feedforward_dim=2048,
        num_layers=6,
        activation="prelu",
        activation_checkpointing=False,
    ),
    heads=L(DetectionHeads)(
        embed_dim="${..neck.embed_dim}",
        num_classes="${..num_classes}",
        num_layers=None,  # null: one class and one box head for all decoder layers
    ),
    criterion=L(SetCriterion)(
        # The class cost of the matcher is twice the class loss weight: both as published.
        matcher=L(HungarianMatcher)(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0),
        ce_weight=1.0,
        bbox_weight=5.0,
        giou_weight=2.0,
        dn_normalizer="local",  # as published; "global" counts every noised box alike
    ),
    denoising=L(DenoisingGenerator)(
        num_classes="${..num_classes}",
        groups=5,
        budget=500,  # five groups up to 100 objects, which is all of COCO, then fewer
        label_noise=0.2,
        center_noise=0.4,
        size_noise=0.4,
        # As published; True makes outputs independent of the other images' objects.
        mask_unused=False,
    ),
    detections_per_image=300,
    detect_one_by_one=True,  # False: a batch as one, whose padding moves smaller images a little
)
