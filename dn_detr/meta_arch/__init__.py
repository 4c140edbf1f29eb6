"""Detectors in detectron2's registry; needs detectron2."""

from dn_detr.meta_arch.backbone import build_resnet, build_small_resnet
from dn_detr.meta_arch.dn_detr import DNDETR
from dn_detr.meta_arch.yacs import add_dn_detr_config

__all__ = ["DNDETR", "add_dn_detr_config", "build_resnet", "build_small_resnet"]
