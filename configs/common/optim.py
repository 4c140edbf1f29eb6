"""AdamW as DETR and its successors use it: 1e-4, and 1e-5 for the backbone, at a batch of 16.

Weight decay is on every parameter, norms and biases included (IDEA-Research/DN-DETR, main.py).
"""

import torch

from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from dn_detr.engine.optimizer import backbone_lr_factor

AdamW = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        # params.model is set by the training script, once the model is built
        base_lr="${..lr}",
        lr_factor_func=L(backbone_lr_factor)(factor=0.1),
    ),
    lr=1e-4,
    weight_decay=1e-4,
)
