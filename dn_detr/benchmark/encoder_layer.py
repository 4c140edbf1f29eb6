"""A whole encoder layer of Deformable DETR: what a faster operation is worth to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from dn_detr.benchmark.cases import CHANNELS, HEADS, OFFSET, STRIDES, Case
from dn_detr.benchmark.implementations import GRID_SAMPLE
from dn_detr.layers.deformable import reference
from dn_detr.modeling import DeformableEncoderLayer, Tokens

DIM = HEADS * CHANNELS
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class LayerProblem:
    """One layer of an encoder case, with everything that a call takes.

    Args:
        case: of an encoder.
        hidden: width of the feed-forward block; published: 1024 (Deformable DETR), 2048 (DINO).
    """

    case: Case
    hidden: int
    layer: DeformableEncoderLayer
    tokens: Tokens
    reference_points: Tensor

    @classmethod
    def make(
        cls, case: Case, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> "LayerProblem":
        """In float32 or float64; lower precision is autocast's."""
        torch.manual_seed(0)
        layer = DeformableEncoderLayer(DIM, HEADS, hidden, "relu", len(STRIDES), num_points=4)
        # Offsets as of a trained model; at its start, all queries look at the same ones.
        nn.init.normal_(layer.self_attn.offsets.weight, std=OFFSET / DIM**0.5)
        features, position = torch.randn(2, case.batch, case.tokens, DIM).to(device, dtype)
        tokens = Tokens(features, position, None, tuple(case.shapes))
        centers = tokens.centers[:, :, None].to(dtype)
        return cls(case, hidden, layer.to(device, dtype), tokens, centers)

    @property
    def name(self) -> str:
        return f"{self.case.name}, layer, FFN {self.hidden}"

    def call(self, implementation: str, passes: str) -> Callable[[], object]:
        """What is to be timed.

        Args:
            implementation: "ours" or "grid_sample".
            passes: one of `PASSES`; gradients are those of tokens and parameters.
        """
        arguments = (self.tokens.position, self.tokens, self.reference_points)
        if passes == "forward":

            def run() -> Tensor:
                with torch.no_grad():
                    return self.layer(self.tokens.features, *arguments)
        else:
            leaves = [self.tokens.features.detach().requires_grad_(), *self.layer.parameters()]

            def run() -> Sequence[Tensor]:
                output = self.layer(leaves[0], *arguments)
                return torch.autograd.grad(output.sum(), leaves)

        return _by_sampling(run) if implementation == GRID_SAMPLE else run

    def least_operations(self, passes: str) -> int:
        """Those of the matrix products; a backward pass has two for each."""
        points = sum(self.layer.self_attn.points_per_level)
        columns = 2 * DIM + 3 * HEADS * points + 2 * self.hidden
        forward = 2 * self.case.rows * DIM * columns
        return forward if passes == "forward" else 3 * forward


def _by_sampling(run: Callable[[], object]) -> Callable[[], object]:
    """`run` with the grid_sample form in the place of the operation."""

    def operation(value, shapes, locations, weights, points_per_level):
        return reference.by_sampling(value, shapes, points_per_level, locations, weights)

    name = "dn_detr.layers.deformable.module.multi_scale_deformable_attention"

    def patched() -> object:
        with mock.patch(name, operation):
            return run()

    return patched
