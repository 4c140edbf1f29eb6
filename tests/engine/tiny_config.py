"""The stand-in detector on a few shapes: a training takes seconds."""

from detectron2.config import LazyCall as L

from tests.engine.tiny import TinyDetector

from ...configs.common.data.shapes import dataloader, dataset
from ...configs.common.optim import AdamW as optimizer
from ...configs.common.schedules import lr_multiplier_50ep as lr_multiplier
from ...configs.common.train import train

model = L(TinyDetector)(num_classes=None)

dataset.generate.size = 32
dataset.generate.num_train = 12
dataset.generate.num_val = 5
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = 0
dataloader.test.num_workers = 0

train.init_checkpoint = ""
train.device = "cpu"
train.max_iter = 6
train.eval_period = 3
train.checkpointer.period = 3
train.log_period = 1
optimizer.lr = 1e-2
