"""The stand-in detector, fed through COCO's augmentation with everything twenty times smaller."""

from ...configs.common.data.coco import dataloader, dataset  # noqa: F401
from ...configs.common.optim import AdamW as optimizer
from ...configs.common.schedules import lr_multiplier_50ep as lr_multiplier  # noqa: F401
from ..engine.tiny_config import model, train  # noqa: F401

_flip, _choice = dataloader.train.mapper.augmentations
_enlarge, _crop, _ = _choice.choices[1].augs
for _resize in (_choice.choices[0], _choice.choices[1].augs[2]):
    _resize.short_edge_length = [24, 32, 40]
    _resize.max_size = 66
_enlarge.short_edge_length = [20, 25, 30]
_enlarge.max_size = 500
_crop.crop_size = [19, 30]
dataloader.test.mapper.augmentations[0].update(short_edge_length=40, max_size=66)
dataloader.train.total_batch_size = 3
dataloader.train.num_workers = 0
dataloader.train.aspect_ratio_grouping = True
dataloader.test.num_workers = 0

optimizer.lr = 1e-3
train.max_iter = 20
train.eval_period = 0
