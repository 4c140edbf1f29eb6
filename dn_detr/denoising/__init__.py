"""Denoising training (DN-DETR, CVPR 2022; contrastive: DINO, ICLR 2023) in plain PyTorch.

For any set-prediction detector. `DenoisingGenerator` turns `Targets` into `NoisedTargets`, which
hold the queries, the attention mask, the split of the outputs and the assignment. Start reading at
`generator`.
"""

from dn_detr.denoising.generator import DenoisingGenerator
from dn_detr.denoising.mask import SHARED, group_attention_mask
from dn_detr.denoising.noise import noise_boxes, noise_corners, noise_labels
from dn_detr.denoising.noised_targets import FlatTargets, NoisedTargets

__all__ = [
    "DenoisingGenerator",
    "FlatTargets",
    "NoisedTargets",
    "SHARED",
    "group_attention_mask",
    "noise_boxes",
    "noise_corners",
    "noise_labels",
]
