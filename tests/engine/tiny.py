"""A stand-in detector that trains in milliseconds."""

import errno
import logging
import multiprocessing
import os
import signal
import time
from unittest import mock

import torch
from torch import nn

from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from dn_detr.evaluation.evaluator import build_evaluator

QUERIES = 4


class TinyDetector(nn.Module):
    """Mean colour of the image -> one class and `QUERIES` boxes; losses are means over images."""

    def __init__(self, num_classes: int, width: int = 8, draws: bool = False) -> None:
        """`draws`: random numbers are part of a training step, as in denoising."""
        super().__init__()
        self.draws = draws
        self.backbone = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width).eval(), nn.ReLU())
        self.backbone.requires_grad_(True)
        self.class_head = nn.Linear(width, num_classes)
        self.box_head = nn.Linear(width, 4 * QUERIES)

    def train(self, mode: bool = True) -> "TinyDetector":
        super().train(mode)
        self.backbone[1].eval()  # statistics are frozen, as in a detector
        return self

    def forward(self, batch):
        device = self.class_head.weight.device
        colours = torch.stack([x["image"].float().mean((1, 2)) / 255 for x in batch]).to(device)
        features = self.backbone(colours)
        if self.draws and self.training:
            features = features + 0.1 * torch.randn_like(features)
        logits = self.class_head(features)
        boxes = self.box_head(features).sigmoid().reshape(len(batch), QUERIES, 4)
        if self.training:
            return self._losses(batch, logits, boxes)
        return [self._detect(*each) for each in zip(batch, logits, boxes)]

    def _losses(self, batch, logits, boxes):
        targets = [x["instances"] for x in batch]
        labels = torch.stack([t.gt_classes[:1].sum() for t in targets]).to(logits.device)
        means = torch.stack([self._mean_box(t) for t in targets]).to(logits.device)
        return {
            "loss_ce": nn.functional.cross_entropy(logits, labels),
            "loss_bbox": (boxes - means[:, None]).abs().mean(),
        }

    @staticmethod
    def _mean_box(target):
        scale = torch.tensor(target.image_size[::-1] * 2)
        return target.gt_boxes.tensor.sum(0) / max(1, len(target)) / scale

    @staticmethod
    def _detect(item, logits, boxes):
        height, width = item["height"], item["width"]
        scale = torch.tensor([width, height, width, height], device=boxes.device)
        low, high = boxes[:, :2] / 2, 0.5 + boxes[:, 2:] / 2
        score, label = logits.softmax(0).max(0)
        result = Instances((height, width))
        result.pred_boxes = Boxes(torch.cat([low, high], 1) * scale)
        result.scores = score * torch.linspace(1, 0.5, QUERIES, device=boxes.device)
        result.pred_classes = label.expand(QUERIES)
        return {"instances": result}


class ElsewhereInProcessOne(TinyDetector):
    """Sends the second of several processes elsewhere, as on a machine with a disk of its own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        if comm.get_rank() == 1:
            os.mkdir("elsewhere")
            os.chdir("elsewhere")


class BreaksInProcessOne(TinyDetector):
    """The losses are NaN in the second of several processes."""

    def forward(self, batch):
        outputs = super().forward(batch)
        if self.training and comm.get_rank() == 1:
            outputs["loss_bbox"] = outputs["loss_bbox"] * float("nan")
        return outputs


class StopsItself(TinyDetector):
    """The last process sends itself a signal within an iteration."""

    def __init__(self, *args, at: int, number: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.at, self.number = at, number

    def forward(self, batch):
        last = comm.get_rank() == comm.get_world_size() - 1
        if self.training and last and get_event_storage().iter == self.at:
            os.kill(os.getpid(), self.number)
        return super().forward(batch)


class Fails(TinyDetector):
    """Something happens to the last process within an iteration."""

    def __init__(self, *args, how: str, at: int = 2, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.how, self.at = how, at
        self.extra = nn.Linear(1, 1) if how == "unused" else None

    def forward(self, batch):
        last = comm.get_rank() == comm.get_world_size() - 1
        if self.training and last and get_event_storage().iter == self.at:
            getattr(self, self.how, lambda: None)()
        return super().forward(batch)

    def exit(self):
        os._exit(7)

    def hang(self):
        time.sleep(1000)

    def ask_twice(self):
        """Ctrl-C, and again while the step still runs."""
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1000)

    def kill_worker(self):
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.2)

    def use_all_memory(self):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    def fill_disk(self):
        """From here on nothing can be written, but what is open by its number."""
        error = OSError(errno.ENOSPC, "No space left on device")
        for target in ("JSONWriter.write", "TensorboardXWriter.write"):
            mock.patch(f"detectron2.utils.events.{target}", side_effect=error).start()
        for handler in logging.getLogger("detectron2").handlers:
            if not hasattr(handler.stream, "fileno") or handler.stream.fileno() > 2:
                mock.patch.object(handler.stream, "write", side_effect=error).start()


def killing_evaluator(*args, **kwargs):
    """Kills the process where the first result would be given."""
    evaluator = build_evaluator(*args, **kwargs)
    evaluator.evaluate = lambda: os.kill(os.getpid(), signal.SIGKILL)
    return evaluator


def stopping_evaluator(*args, **kwargs):
    """The last process is asked to stop with its first image."""
    evaluator = build_evaluator(*args, **kwargs)
    process = evaluator.process

    def stop(inputs, outputs):
        if comm.get_rank() == comm.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        process(inputs, outputs)

    evaluator.process = stop
    return evaluator
