"""The DINO in the DN-DETR repository (R50, 36 epochs): 50.8 to 51.0 AP (issue #43 there).

https://github.com/IDEA-Research/DN-DETR, models/dn_dab_dino_deformable_detr with --two_stage
--contrastive. It is DN-Deformable-DETR with proposals by one objectness logit, losses on all
encoder tokens, and look forward twice. Its contrastive noise mixed up the images of a batch; here
it does not.
"""

from detectron2.config import LazyCall as L

from dn_detr.modeling import ProposalQueries

from ....configs.common.schedules import lr_multiplier_36ep as lr_multiplier
from ...dn_deformable_detr.configs.dn_deformable_detr_r50_50ep import (
    dataloader,
    dataset,
    model,
    optimizer,
    train,
)

model.queries = L(ProposalQueries)(
    num_queries=300,
    embed_dim="${..neck.embed_dim}",
    num_classes="${..num_classes}",
    indicator=True,
    objectness=True,
    supervise_all=True,
)
model.decoder.look_forward_twice = True
model.heads.size_bias = 0.0
# corner_noise: the default of that repository, 0.4; the flags of the published run are not known.
model.denoising.update(contrastive=True, corner_noise=0.4, unknown_negatives=True)
for _name in ("center_noise", "size_noise"):
    del model.denoising[_name]

train.epochs = 36
train.output_dir = "./output/dn_dino_r50_36ep"
