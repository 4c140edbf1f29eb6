"""Multi-scale deformable attention: the operation, its module, and the readable reference.

The operation's own kernels are in dn_detr/layers/csrc.
"""

from dn_detr.layers.deformable.function import multi_scale_deformable_attention
from dn_detr.layers.deformable.module import MultiScaleDeformableAttention, project_values

__all__ = ["MultiScaleDeformableAttention", "multi_scale_deformable_attention", "project_values"]
