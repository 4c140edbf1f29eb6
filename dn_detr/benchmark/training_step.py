"""Time and memory of a training step of any config, under several sets of overrides.

On the CPU, memory is measured in a process of its own for each, which this file is.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from dn_detr.benchmark import measuring, report
from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import instantiate  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

from dn_detr.engine.config import load_config  # noqa: E402

HEADER = ("variant", "s a step", "times the first", "extra MiB", "of the first's")


@dataclass(frozen=True)
class Step:
    """A training step: forward, losses, backward; without the optimizer.

    Args:
        config_file: the config; its `model.num_classes` null means COCO's 80.
        overrides: of the config.
        batch, height, width: number and size of the images.
        objects: in every image.
    """

    config_file: str
    overrides: tuple[str, ...]
    batch: int
    height: int
    width: int
    objects: int

    def model(self, device: torch.device) -> nn.Module:
        """With random weights, and gradients that are there already."""
        cfg = load_config(self.config_file, list(self.overrides)).model
        cfg.num_classes = cfg.num_classes or 80
        torch.manual_seed(0)
        model = instantiate(cfg).to(device).train()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        return model

    def inputs(self) -> list[dict]:
        """Random images and boxes."""
        g = torch.Generator().manual_seed(0)
        size = torch.tensor([self.width, self.height] * 2)
        inputs = []
        for _ in range(self.batch):
            corners = torch.rand(self.objects, 2, generator=g) * 0.7
            sides = 0.02 + 0.25 * torch.rand(self.objects, 2, generator=g)
            instances = Instances(
                (self.height, self.width),
                gt_boxes=Boxes(torch.cat([corners, corners + sides], dim=1) * size),
                gt_classes=torch.zeros(self.objects, dtype=torch.long),
            )
            shape = (3, self.height, self.width)
            image = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
            inputs.append({"image": image, "instances": instances})
        return inputs

    def call(self, device: torch.device) -> Callable[[], object]:
        """What is to be measured."""
        model, inputs = self.model(device), self.inputs()
        return lambda: sum(model(inputs).values()).backward()


@dataclass(frozen=True)
class Row:
    """What a variant costs.

    Args:
        seconds: of each round.
        memory: peak bytes beyond model, gradients and images.
    """

    name: str
    seconds: Sequence[float]
    memory: int

    @property
    def time(self) -> float:
        return statistics.median(self.seconds)


def measure(steps: dict[str, Step], device: torch.device, budget: float) -> list[Row]:
    """All variants: memory one by one, then times in turns.

    Args:
        steps: variants by name.
        device: where to run.
        budget: seconds for the times of all of them; at least 3 rounds are made.

    Raises:
        ValueError: a config or an override does not fit.
        OSError: on the CPU of another system than Linux.
        RuntimeError: a step failed.
    """
    # First: a mistake in a config would come from the other process with its whole traceback.
    calls = {name: (lambda: None, step.call(device)) for name, step in steps.items()}
    memory = {name: _memory(step, device) for name, step in steps.items()}
    times = measuring.interleaved(calls, device, budget)
    return [Row(name, times[name], memory[name]) for name in steps]


def _memory(step: Step, device: torch.device) -> int:
    if device.type == "cuda":
        return measuring.extra_memory_cuda(step.call(device))
    request = {"step": asdict(step), "threads": torch.get_num_threads()}
    return measuring.in_child(__name__, request)["memory"]


def table(rows: Sequence[Row]) -> str:
    """Markdown; ratios are to the first row."""
    first = rows[0]
    lines = [report.line(HEADER), report.line(["---"] * len(HEADER))]
    for row in rows:
        numbers = (
            f"{row.time:.3g}",
            f"{row.time / first.time:.2f}",
            report.mebibytes(row.memory),
            f"{row.memory / first.memory:.2f}",
        )
        lines.append(report.line((row.name, *numbers)))
    return "\n".join(lines)


def _serve(request: dict) -> dict[str, int]:
    torch.set_num_threads(request["threads"])
    step = Step(**request["step"])
    small = Step(step.config_file, step.overrides, 1, 64, 64, 1)
    small.call(torch.device("cpu"))()  # threads and libraries have memory of their own
    return {"memory": measuring.extra_memory_cpu(step.call(torch.device("cpu")))}


if __name__ == "__main__":
    print(json.dumps(_serve(json.loads(sys.argv[1]))))
