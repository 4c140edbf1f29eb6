"""Tensors in, tensors out: boxes, padded targets, perceptrons, position codes, attention.

Plain PyTorch.
"""

from dn_detr.layers.assignment import Assignment
from dn_detr.layers.attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    SelfAttention,
)
from dn_detr.layers.boxes import generalized_box_iou, inverse_sigmoid
from dn_detr.layers.deformable import (
    MultiScaleDeformableAttention,
    multi_scale_deformable_attention,
    project_values,
)
from dn_detr.layers.mlp import MLP, FeedForward
from dn_detr.layers.position import SinePositionEncoding, encode_anchors, sine_encode
from dn_detr.layers.targets import Targets

__all__ = [
    "Assignment",
    "ConditionalCrossAttention",
    "ConditionalSelfAttention",
    "FeedForward",
    "MLP",
    "MultiScaleDeformableAttention",
    "SelfAttention",
    "SinePositionEncoding",
    "Targets",
    "encode_anchors",
    "generalized_box_iou",
    "inverse_sigmoid",
    "multi_scale_deformable_attention",
    "project_values",
    "sine_encode",
]
