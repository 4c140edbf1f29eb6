"""Learning-rate schedules, relative to the length of the training: independent of batch and data.

The numbers of `multistep` are epochs; where train.epochs or train.max_iter says otherwise, the drop
comes at the same share of the training.
"""

from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler


def multistep(epochs, drop):
    """Constant, then a tenth after `drop` of `epochs` epochs; no warm-up."""
    return L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[drop], num_updates=epochs)


def warmup_cosine(warmup_length=0.05, end_value=0.01):
    """Linear warm-up over a share of the training, then half a cosine: for small runs."""
    return L(WarmupParamScheduler)(
        scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=end_value),
        warmup_factor=0.01,
        warmup_length=warmup_length,
        warmup_method="linear",
    )


lr_multiplier_50ep = multistep(50, drop=40)  # DN-DETR, DAB-DETR: README and scripts
lr_multiplier_12ep = multistep(12, drop=11)  # DN-DETR paper, section 5.1 (1x setting)
lr_multiplier_24ep = multistep(24, drop=20)  # DINO paper, section 4.1
lr_multiplier_36ep = multistep(36, drop=30)  # DINO paper, section 4.1
lr_multiplier_warmup_cosine = warmup_cosine()
