"""As tiny_config.py, with all that a resume has to restore; images of two shapes."""

from .tiny_config import dataloader, dataset, lr_multiplier, model, optimizer, train

model.draws = True
dataset.generate = None  # made, and cut, by tests/integration/test_resume_exact.py
train.max_iter = 7
train.eval_period = 2
train.checkpointer.period = 2
train.ema.enabled = True
train.best_metric = "bbox/AP"
