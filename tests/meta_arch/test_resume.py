"""Training of a model of every family, stopped and resumed."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from dn_detr.checkpoint.writing import save_atomically
from dn_detr.data.loader import build_train_loader
from dn_detr.engine.ema import WeightAverage
from dn_detr.engine.trainer import Trainer

from tests.equal import assert_equal
from tests.meta_arch.small import FAMILIES, small_model

IMAGES = [{"image_id": i, "width": 96, "height": 64 + 16 * (i % 3)} for i in range(5)]


def draw(item):
    """A mapper that makes an image up, with up to three boxes."""
    height, width = item["height"], item["width"]
    corners = torch.rand(item["image_id"] % 4, 2) * 30
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat([corners, corners + 4 + 20 * torch.rand_like(corners)], 1))
    instances.gt_classes = torch.randint(3, (len(corners),))
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {**item, "image": image, "instances": instances}


class Training:
    def __init__(self, family, amp_dtype):
        self.model = small_model(family)
        loader = build_train_loader(IMAGES, draw, total_batch_size=2, seed=3)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.trainer = Trainer(
            self.model,
            loader,
            optimizer,
            seed=3,
            accumulate=2,
            amp_dtype=amp_dtype,
            clip_grad={"max_norm": 0.1},
        )
        self.average = WeightAverage(self.model)

    def run(self, start, end):
        with EventStorage(start) as self.trainer.storage:
            for self.trainer.iter in range(start, end):
                self.trainer.run_step()
                self.average.update(self.model)

    def save(self, path):
        parts = {"model": self.model, "trainer": self.trainer, "ema": self.average}
        save_atomically({name: part.state_dict() for name, part in parts.items()}, path)
        return torch.load(path, weights_only=True)

    def load(self, path):
        for name, state in torch.load(path, weights_only=True).items():
            part = {"model": self.model, "trainer": self.trainer, "ema": self.average}[name]
            part.load_state_dict(state)


@pytest.mark.fault(62)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_a_resumed_training_is_the_same_bit_by_bit(family, amp_dtype, tmp_path):
    straight, first, second = (Training(family, amp_dtype) for _ in range(3))
    straight.run(0, 4)
    first.run(0, 2)
    first.save(tmp_path / "stopped.pth")
    for parameter in second.model.parameters():
        torch.nn.init.zeros_(parameter)  # nothing is left of how it was made
    second.load(tmp_path / "stopped.pth")
    second.run(2, 4)
    expected, found = straight.save(tmp_path / "a.pth"), second.save(tmp_path / "b.pth")
    assert found["trainer"]["images_seen"] == 16
    for stored in (expected, found):
        del stored["trainer"]["metrics"]  # seconds are among them
    assert_equal(expected, found)
