"""DINO with ResNet-50 and four levels (Zhang et al., ICLR 2023).

https://github.com/IDEA-Research/DINO, config/DINO/DINO_4scale.py with the overrides of
scripts/DINO_train.sh: box noise 1.0 where the file has 0.4.
"""

from detectron2.config import LazyCall as L

from dn_detr.modeling import ProposalQueries

from ....dn_deformable_detr.configs.models.dn_deformable_detr_r50 import model

model.neck.position_encoding.update(temperature=20, offset=0.0)
model.queries = L(ProposalQueries)(
    num_queries=900,
    embed_dim="${..neck.embed_dim}",
    num_classes="${..num_classes}",
    indicator=False,
    objectness=False,
    supervise_all=False,
)
model.decoder.update(position_scale=False, final_norm=True, look_forward_twice=True)
model.heads.update(num_layers=None, size_bias=0.0)  # one of each for all decoder layers
model.criterion.dn_normalizer = "global"
model.denoising.update(
    contrastive=True,
    groups=None,
    budget=100,  # pairs of a positive and a negative: as many groups as there is room for
    label_noise=0.25,  # dn_label_noise_ratio 0.5, of which the code takes half
    corner_noise=1.0,
    swap_inverted=False,
    # As published; False ignores slots without a target.
    classify_unused=True,
)
for _name in ("center_noise", "size_noise"):
    del model.denoising[_name]
