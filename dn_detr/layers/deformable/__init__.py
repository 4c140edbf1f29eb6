"""Multi-scale deformable attention: the operation, its module, and the readable reference.

The operation's own kernels are in dn_detr/layers/csrc.
"""

from dn_detr.layers.deformable.function import multi_scale_deformable_attention

__all__ = ["multi_scale_deformable_attention"]
