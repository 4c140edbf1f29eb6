"""DAB-DETR-R50-DC5 proper, the baseline, 50 epochs: 44.5 AP (DAB-DETR paper, table 2)."""

from .dab_detr_r50_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.dc5 = True
# The temperature at which detrex evaluates the published weights of this one model.
model.neck.position_encoding.temperature = 10
train.output_dir = "./output/dab_detr_r50_dc5_50ep"
