"""DN-Deformable-DETR of the CVPR paper with ResNet-50: deformable in the encoder only.

https://github.com/IDEA-Research/DN-DETR, models/dn_dab_deformable_detr_deformable_encoder_only. The
decoder is DN-DETR's, with attention to each level apart and learned level weights.
"""

from detectron2.config import LazyCall as L

from dn_detr.modeling import DABDecoder

from .dn_deformable_detr_r50 import model

model.neck.position_encoding.update(temperature=20, offset=0.0)
model.neck.xavier = False
model.encoder.xavier_attention = True
model.queries.update(content="unknown_label", num_patterns=3, pattern_std=0.086)
model.decoder = L(DABDecoder)(
    embed_dim="${..neck.embed_dim}",
    num_heads=8,
    feedforward_dim=2048,
    num_layers=6,
    num_levels="${..neck.num_levels}",
    activation="relu",
    activation_checkpointing=False,
)
model.heads.update(num_layers=None, size_bias=0.0, zero_boxes=False)
# Ten in the paper (section 5.1); the command in the authors' README has five.
model.denoising.update(groups=10, budget=1000)
