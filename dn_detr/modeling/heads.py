"""Prediction heads: classes by sigmoid, boxes as offsets to anchors in logit space."""

import math

from torch import Tensor, nn

from dn_detr.layers import MLP, inverse_sigmoid
from dn_detr.modeling.structures import Predictions

PRIOR = 0.01
"""Initial probability of every class (focal loss: Lin et al., ICCV 2017, sec. 4.1)."""


class DetectionHeads(nn.Module):
    """One linear class head and one three-layer box head, shared by all decoder layers.

    The box head starts at zero: the first boxes are the anchors.

    Args:
        embed_dim: D.
        num_classes: C. There is no background row.
    """

    def __init__(self, embed_dim: int, num_classes: int):
        super().__init__()
        self.class_embed = nn.Linear(embed_dim, num_classes)
        self.bbox_embed = MLP(embed_dim, embed_dim, 4, 3)
        nn.init.constant_(self.class_embed.bias, -math.log((1 - PRIOR) / PRIOR))
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)

    def refine(self, states: Tensor, anchors: Tensor) -> Tensor:
        """states [..., D], anchors [..., 4] in 0..1 -> boxes [..., 4] in 0..1, cxcywh, float32"""
        return (self.bbox_embed(states) + inverse_sigmoid(anchors)).sigmoid()

    def forward(self, states: Tensor, anchors: Tensor) -> Predictions:
        """states [L, B, Q, D], anchors [L, B, Q, 4] that each layer started from -> predictions of all layers"""
        return Predictions(
            logits=self.class_embed(states).float(), boxes=self.refine(states, anchors)
        )
