"""The training loop: what detectron2's engine lacks (any device, bf16, accumulation, EMA, checks)."""
