"""A DN-DETR of 1.7 M parameters, for small images and training from scratch in minutes.

It is the dense DN-DETR with everything smaller, on stride 8 instead of 32. What differs beyond size
makes a short training possible: position codes of four periods an image, and cross-attention that
starts out aligned with them.
"""

import math

from detectron2.config import LazyCall as L

from dn_detr.meta_arch import build_small_resnet

from .dn_detr_r50 import model

model.backbone = L(build_small_resnet)(channels=[32, 64, 128], blocks=[1, 2, 2], strides=[1, 2, 1])
model.neck.in_feature = "res4"
model.neck.in_channels = 128
model.neck.embed_dim = 128
model.neck.position_encoding.scale = 8 * math.pi
model.neck.position_encoding.offset = -0.5
model.neck.exact_mask = True
# No encoder layer: in five minutes it costs more steps than it gains.
model.encoder.update(num_heads=4, feedforward_dim=256, num_layers=0, activation="relu")
model.decoder.update(num_heads=4, feedforward_dim=256, num_layers=3, activation="relu")
model.decoder.anchor_temperature = "${..neck.position_encoding.temperature}"
model.decoder.anchor_scale = "${..neck.position_encoding.scale}"
model.decoder.aligned_positions = 3.0
model.heads.num_layers = "${..decoder.num_layers}"
model.queries.num_queries = 40
model.queries.anchor_init = "grid"
model.queries.label_std = 0.3
model.criterion.update(ce_weight=5.0, dn_normalizer="global")
model.denoising.groups = 4
model.denoising.mask_unused = True
model.detections_per_image = 100
