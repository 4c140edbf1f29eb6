"""The training loop, as far as detectron2 lacks it: any device, bf16, accumulation, EMA, checks."""
