"""DN-Deformable-DETR with ResNet-50, deformable in encoder and decoder.

"v2" or "++" of https://github.com/IDEA-Research/DN-DETR, models/dn_dab_deformable_detr.
"""

from detectron2.config import LazyCall as L

from dn_detr.layers import SinePositionEncoding
from dn_detr.meta_arch import DNDETR, build_resnet
from dn_detr.modeling import (
    AnchorQueries,
    DeformableDecoder,
    DeformableEncoder,
    DetectionHeads,
    MultiLevelNeck,
)

from ....dn_detr.configs.models.dn_detr_r50 import model as dense

model = L(DNDETR)(
    num_classes=None,  # null: from the data; 91: classes are COCO category ids, as published
    backbone=L(build_resnet)(
        depth=50,
        freeze_at=2,
        out_features=["res3", "res4", "res5"],
        activation_checkpointing=False,
    ),
    neck=L(MultiLevelNeck)(
        in_features=dict(res3=512, res4=1024, res5=2048),
        embed_dim=256,
        num_levels=4,
        level_embed=True,  # False where model.encoder.num_layers=0: nothing reads it
        position_encoding=L(SinePositionEncoding)(
            embed_dim="${..embed_dim}", temperature=10000, offset=-0.5
        ),
        exact_mask=False,  # as published; True: padded images have the coordinates they have alone
    ),
    encoder=L(DeformableEncoder)(
        embed_dim="${..neck.embed_dim}",
        num_heads=8,
        feedforward_dim=2048,
        num_layers=6,
        num_levels="${..neck.num_levels}",
        num_points=4,
        activation="relu",
        activation_checkpointing=False,
    ),
    queries=L(AnchorQueries)(
        num_queries=300,
        embed_dim="${..neck.embed_dim}",
        num_classes="${..num_classes}",
        content="learned",
        labels=True,
    ),
    decoder=L(DeformableDecoder)(
        embed_dim="${..neck.embed_dim}",
        num_heads=8,
        feedforward_dim=2048,
        num_layers=6,
        num_levels="${..neck.num_levels}",
        num_points=4,
        activation="relu",
        position_scale=True,
        final_norm=False,
        look_forward_twice=False,
        activation_checkpointing=False,
    ),
    heads=L(DetectionHeads)(
        embed_dim="${..neck.embed_dim}",
        num_classes="${..num_classes}",
        num_layers="${..decoder.num_layers}",  # one of each for every decoder layer
        size_bias=-2.0,
    ),
    criterion=dense.criterion,
    denoising=dense.denoising,
    detections_per_image=300,  # published: 100, where all relatives keep 300
    detect_one_by_one=True,  # False: a batch as one, whose padding moves smaller images a little
)
