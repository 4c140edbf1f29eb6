"""A DN-Deformable-DETR of 1.7 M parameters, for small images and training from scratch in minutes.

It is DN-Deformable-DETR with everything smaller, on strides 8 and 16, and anchors that the encoder
proposes (DINO's mixed query selection): learned anchors need more steps to come as far.
"""

from detectron2.config import LazyCall as L

from dn_detr.meta_arch import build_small_resnet
from dn_detr.modeling import ProposalQueries

from .dn_deformable_detr_r50 import model

model.backbone = L(build_small_resnet)(channels=[32, 64, 128], blocks=[1, 2, 2], strides=[1, 2, 1])
model.neck.update(embed_dim=128, num_levels=2)
model.neck.in_features = dict(res4=128)
model.neck.exact_mask = True
model.encoder.update(num_heads=4, feedforward_dim=256, num_layers=1)
model.queries = L(ProposalQueries)(
    num_queries=40,
    embed_dim="${..neck.embed_dim}",
    num_classes="${..num_classes}",
    indicator=True,
    label_std=0.3,
)
model.decoder.update(num_heads=4, feedforward_dim=256, num_layers=3)
model.heads.size_bias = 0.0  # proposals have a size already
model.criterion.update(ce_weight=5.0, dn_normalizer="global")
model.denoising.update(groups=4, mask_unused=True)
model.detections_per_image = 100
