"""DN-DETR for detectron2: denoising training and the detectors around it.

`dn_detr.layers`, `dn_detr.denoising` and `dn_detr.modeling` are plain PyTorch. What else is here
needs detectron2 and says so when it is missing (`dn_detr.requirements`). Importing this package
imports neither.
"""

__version__ = "0.1.0"
