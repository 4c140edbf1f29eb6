"""The demo: a small DN-DETR on the built-in shapes, five minutes on two CPU cores."""

from ....configs.common.data.shapes import dataloader, dataset
from ....configs.common.optim import AdamW as optimizer
from ....configs.common.schedules import lr_multiplier_warmup_cosine as lr_multiplier
from ....configs.common.train import train
from .models.small_dn_detr import model

optimizer.lr = 3e-4
optimizer.params.lr_factor_func.factor = 6.0  # the backbone starts from scratch
optimizer.fused = True

train.init_checkpoint = ""
train.max_iter = 1800
train.reference_batch_size = 8
train.eval_period = 900
train.log_period = 50
train.clip_grad.params.max_norm = 0.5
train.ema.enabled = True
train.ema.decay = 0.995
train.output_dir = "./output/shapes_demo"
