"""Prediction heads: classes by sigmoid, boxes as offsets to anchors in logit space."""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from dn_detr.layers import MLP, inverse_sigmoid
from dn_detr.modeling.structures import Predictions

PRIOR = 0.01
"""Initial probability of every class (focal loss: Lin et al., ICCV 2017, sec. 4.1)."""


def check_num_classes(num_classes: int | None) -> None:
    """Refuses what a config leaves open.

    Raises:
        ValueError: not an integer of at least 1.
    """
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(
            f"model.num_classes={num_classes}: a model needs an integer of at least 1. "
            "tools/train_net.py fills null from the data; elsewhere set cfg.model.num_classes=N "
            "before instantiate(cfg.model)."
        )


def class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    """Linear layer whose classes are improbable at the start (`PRIOR`)."""
    check_num_classes(num_classes)
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


def box_head(embed_dim: int, zero: bool = True) -> MLP:
    """Perceptron of three layers, the last one zero at the start unless `zero` is False."""
    head = MLP(embed_dim, embed_dim, 4, 3)
    if zero:
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    return head


class DetectionHeads(nn.Module):
    """A linear class head and a three-layer box head.

    The box head starts at zero: the first boxes are the anchors.

    Args:
        embed_dim: D.
        num_classes: C. There is no background row.
        num_layers: None: one of each for all decoder layers (DAB-DETR, DN-DETR, DINO); a number:
            one of each for every layer, equal at the start (DAB- and DN-Deformable-DETR).
        zero_boxes: False leaves the box head at PyTorch's start (the published encoder-only model,
            by an oversight it seems).
        size_bias: of the first box head at the start, in logits of width and height; Deformable
            DETR and its descendants start with small boxes, -2. With `num_layers` only.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        num_layers: int | None = None,
        zero_boxes: bool = True,
        size_bias: float = 0.0,
    ):
        super().__init__()
        class_embed = class_head(embed_dim, num_classes)
        bbox_embed = box_head(embed_dim, zero_boxes)
        self.shared = num_layers is None
        if not self.shared:
            class_embed = nn.ModuleList(deepcopy(class_embed) for _ in range(num_layers))
            bbox_embed = nn.ModuleList(deepcopy(bbox_embed) for _ in range(num_layers))
            if size_bias:
                nn.init.constant_(bbox_embed[0].layers[-1].bias[2:], size_bias)
        self.class_embed = class_embed
        self.bbox_embed = bbox_embed

    def refine(self, layer: int, states: Tensor, anchors: Tensor) -> Tensor:
        """states [..., D] of a decoder layer, anchors [..., 4] -> boxes [..., 4], float32

        Anchors and boxes are cxcywh in 0..1.
        """
        bbox_embed = self.bbox_embed if self.shared else self.bbox_embed[layer]
        return (bbox_embed(states) + inverse_sigmoid(anchors)).sigmoid()

    def forward(self, states: Tensor, anchors: Tensor) -> Predictions:
        """states [L, B, Q, D], anchors [L, B, Q, 4] -> predictions of all layers

        The anchors are those that each layer started from.
        """
        if self.shared:
            return Predictions(
                logits=self.class_embed(states).float(), boxes=self.refine(-1, states, anchors)
            )
        logits = [head(state) for head, state in zip(self.class_embed, states, strict=True)]
        boxes = [self.refine(i, *pair) for i, pair in enumerate(zip(states, anchors, strict=True))]
        return Predictions(logits=torch.stack(logits).float(), boxes=torch.stack(boxes))
