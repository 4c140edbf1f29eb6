"""DAB-Deformable-DETR-R50, the baseline, 50 epochs: 48.7 AP (DN-DETR paper, table 4).

It differs from DN-Deformable-DETR without denoising (`model.denoising=null`) in what denoising
needs of the queries: a label embedding and an indicator.
"""

from .dn_deformable_detr_r50_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.denoising = None
model.queries.labels = False
train.output_dir = "./output/dab_deformable_detr_r50_50ep"
