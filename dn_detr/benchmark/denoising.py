"""Memory of a training step of DN-DETR's decoder: from the published way, in steps, to ours.

With N noised targets in a batch, the published code (https://github.com/IDEA-Research/DN-DETR)
holds for the backward pass, in every layer, the attention weights of all pairs of queries, and the
generalised IoU of all N x N pairs, of which it takes the diagonal; and N is the fixed number of
groups times the number of objects. On the CPU, `measure` starts this file in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn

from dn_detr.benchmark import measuring, report
from dn_detr.denoising import DenoisingGenerator, NoisedTargets
from dn_detr.layers import Targets
from dn_detr.modeling import (
    AnchorQueries,
    DABDecoder,
    DetectionHeads,
    HungarianMatcher,
    Predictions,
    SetCriterion,
    Tokens,
)

HEADER = ("objects an image", "way", "slots", "extra MiB", "of the published")
PUBLISHED = "published"


@dataclass(frozen=True)
class Way:
    """How to denoise.

    Args:
        groups, budget: of `DenoisingGenerator`.
        all_pairs: the GIoU loss takes the diagonal of all pairs.
        keeps_weights: attention holds its weights.
    """

    name: str
    groups: int
    budget: int | None = None
    all_pairs: bool = False
    keeps_weights: bool = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, attention and criterion work in this way."""
        with contextlib.ExitStack() as stack:
            if self.all_pairs:
                name = "dn_detr.modeling.criterion.generalized_box_iou"
                stack.enter_context(mock.patch(name, diagonal_of_all_pairs))
            if self.keeps_weights:
                name = "dn_detr.layers.attention.scaled_dot_product_attention"
                stack.enter_context(mock.patch(name, attention_with_weights))
            yield


def ways(groups: int, budgets: Sequence[int]) -> list[Way]:
    """The published way; then one change after the other; then budgets."""
    return [
        Way(PUBLISHED, groups, all_pairs=True, keeps_weights=True),
        Way("+ GIoU of its pairs alone", groups, keeps_weights=True),
        Way("+ attention in one kernel", groups),
        *(Way(f"+ budget of {budget} (ours)", groups, budget) for budget in budgets),
    ]


def diagonal_of_all_pairs(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """[L, B, K, 4] twice, xyxy -> [L, B, K]: a matrix of (B K)^2 for every layer"""
    matrices = [
        torchvision.ops.generalized_box_iou(a.flatten(0, 1), b.flatten(0, 1))
        for a, b in zip(boxes1, boxes2)
    ]
    return torch.stack([matrix.diagonal() for matrix in matrices]).view(boxes1.shape[:-1])


def attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """The formula: [B, H, Q, D], [B, H, S, D], [B, H, S, E] -> [B, H, Q, E]"""
    scores = (query / query.shape[-1] ** 0.5) @ key.transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill_(~allowed, -torch.inf)
    return scores.softmax(-1) @ value


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of a batch; those of DN-DETR with ResNet-50.

    Args:
        memory: height and width of the feature map; 25 x 34 is that of 800 x 1088 pixels.
    """

    batch: int = 1
    queries: int = 300
    layers: int = 6
    embed_dim: int = 256
    heads: int = 8
    feedforward_dim: int = 2048
    classes: int = 91
    memory: tuple[int, int] = (25, 34)

    def targets(self, objects: int, device: torch.device) -> Targets:
        """`objects` random ones in every image."""
        g = torch.Generator().manual_seed(0)
        shape = (self.batch, objects)
        labels = torch.randint(self.classes, shape, generator=g)
        centers = torch.rand(*shape, 2, generator=g)
        sizes = 0.02 + 0.1 * torch.rand(*shape, 2, generator=g)
        boxes = torch.cat([centers, sizes], dim=-1)
        return Targets.pad(list(labels), list(boxes)).to(device)

    def tokens(self, device: torch.device) -> Tokens:
        """Random ones in the place of the encoder's, which gradients would reach."""
        g = torch.Generator().manual_seed(0)
        shape = (2, self.batch, self.memory[0] * self.memory[1], self.embed_dim)
        features, position = torch.randn(shape, generator=g).to(device)
        return Tokens(features.requires_grad_(), position, None, (tuple(self.memory),))


class Detector(nn.Module):
    """What of DN-DETR is behind the encoder."""

    def __init__(self, setting: Setting):
        super().__init__()
        dim = setting.embed_dim
        self.queries = AnchorQueries(setting.queries, dim, setting.classes)
        self.decoder = DABDecoder(dim, setting.heads, setting.feedforward_dim, setting.layers)
        self.heads = DetectionHeads(dim, setting.classes)
        self.criterion = SetCriterion(HungarianMatcher())

    def forward(self, tokens: Tokens, targets: Targets, noised: NoisedTargets) -> Tensor:
        """The sum of all losses."""
        states, anchors = self.decoder(self.queries(tokens, noised), tokens, self.heads.refine)
        both = self.heads(states, anchors)
        parts = zip(noised.split(both.logits, dim=2), noised.split(both.boxes, dim=2))
        denoising, matching = (Predictions(*part) for part in parts)
        return sum(self.criterion(matching, targets, denoising, noised).values())


def training_step(
    way: Way, setting: Setting, device: torch.device
) -> Callable[[Targets], tuple[int, Tensor]]:
    """Targets -> slots of an image, and the loss; gradients have been added to what there was."""
    torch.manual_seed(0)
    detector, tokens = Detector(setting).to(device), setting.tokens(device)
    generator = DenoisingGenerator(setting.classes, way.groups, way.budget)

    def step(targets: Targets) -> tuple[int, Tensor]:
        torch.manual_seed(0)
        noised = generator(targets)
        with way.active():
            loss = detector(tokens, targets, noised)
            loss.backward()
        return len(noised), loss.detach()

    return step


@dataclass(frozen=True)
class Row:
    """What one way costs.

    Args:
        objects: in every image.
        way: its name.
        slots: for noised targets, in every image.
        memory: peak bytes of a training step beyond model, gradients and input.
    """

    objects: int
    way: str
    slots: int
    memory: int


def measure(way: Way, setting: Setting, objects: int, device: torch.device) -> Row:
    """One training step; on the CPU in a process of its own.

    Raises:
        OSError: on the CPU of another system than Linux.
        RuntimeError: the step failed, for want of memory perhaps.
    """
    if device.type == "cuda":
        return _row(way, setting, objects, device)
    request = {
        "way": asdict(way),
        "setting": asdict(setting),
        "objects": objects,
        "threads": torch.get_num_threads(),
    }
    return Row(**measuring.in_child(__name__, request))


def _row(way: Way, setting: Setting, objects: int, device: torch.device) -> Row:
    step, slots = training_step(way, setting, device), []
    step(setting.targets(1, device))  # gradients, threads and libraries have memory of their own
    targets = setting.targets(objects, device)
    extra = measuring.extra_memory_cuda if device.type == "cuda" else measuring.extra_memory_cpu
    memory = extra(lambda: slots.append(step(targets)[0]))
    return Row(objects, way.name, slots[-1], memory)


def table(rows: Sequence[Row]) -> str:
    """Markdown; shares are those of the published way with as many objects."""
    published = {row.objects: row.memory for row in rows if row.way == PUBLISHED}
    lines = [report.line(HEADER), report.line(["---"] * len(HEADER))]
    for row in rows:
        base = published.get(row.objects)
        share = f"{row.memory / base:.2f}" if base else ""
        numbers = (row.slots, report.mebibytes(row.memory), share)
        lines.append(report.line(map(str, (row.objects, row.way, *numbers))))
    return "\n".join(lines)


def write(
    rows: Sequence[Row], environment: Mapping[str, object], folder: str | Path
) -> tuple[Path, Path]:
    """Writes denoising.md and .json into a folder.

    Args:
        environment: what is to be known about machine and run.

    Returns:
        the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / "denoising.md", folder / "denoising.json"
    text.write_text(f"{report.describe(environment)}\n\n{table(rows)}\n")
    content = {"environment": environment, "rows": [asdict(row) for row in rows]}
    data.write_text(json.dumps(content, indent=1) + "\n")
    return text, data


def _serve(request: dict) -> dict[str, object]:
    torch.set_num_threads(request["threads"])
    way, setting = Way(**request["way"]), Setting(**request["setting"])
    return asdict(_row(way, setting, request["objects"], torch.device("cpu")))


if __name__ == "__main__":
    print(json.dumps(_serve(json.loads(sys.argv[1]))))
