"""DAB-DETR-R50 proper, the baseline, 50 epochs: 42.2 AP (DAB-DETR paper, table 2).

It differs from DN-DETR without denoising (`model.denoising=null`) in its query content: zeros.
"""

from .dn_detr_r50_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.denoising = None
model.queries.content = "zeros"
model.queries.labels = False
train.output_dir = "./output/dab_detr_r50_50ep"
