"""Implementations of multi-scale deformable attention that may be installed here."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dn_detr.benchmark.cases import Inputs
from dn_detr.layers.deformable import extension, reference
from dn_detr.layers.deformable.function import multi_scale_deformable_attention

Shapes = Sequence[tuple[int, int]]
Function = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]

OURS, GRID_SAMPLE = "ours", "grid_sample"

# Modules with the interface of the authors' extension: `ms_deform_attn_forward` and `_backward`.
CLASSIC = {
    "Deformable-DETR's extension": "MultiScaleDeformableAttention",
    "detrex's extension": "detrex._C",
}


@dataclass(frozen=True)
class Implementation:
    """
    Args:
        name: as in tables.
        function: (value, shapes, locations, weights) -> output, as in `Inputs`.
        prepare: to be called before calls of the function.
    """

    name: str
    function: Function
    prepare: Callable[[], object] = lambda: None

    def forward(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return self.function(inputs.value, inputs.shapes, inputs.locations, inputs.weights)

    def call(self, inputs: Inputs, passes: str) -> Callable[[], object]:
        """What is to be timed.

        Args:
            passes: one of `cases.PASSES`; "backward" makes its graph here, before it is called.
        """
        if passes == "forward":
            return partial(self.forward, inputs)
        leaves = inputs.leaves()
        value, locations, weights = leaves
        output = partial(self.function, value, inputs.shapes, locations, weights)
        if passes == "forward+backward":
            return lambda: torch.autograd.grad(output(), leaves, inputs.gradient)
        made = output()
        return lambda: torch.autograd.grad(made, leaves, inputs.gradient, retain_graph=True)


def grid_sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    points = [locations.shape[4]] * len(shapes)
    return reference.by_sampling(value, shapes, points, locations.flatten(3, 4), weights.flatten(3))


class ClassicFunction(torch.autograd.Function):
    """The operation by a module that has the interface of the authors' extension."""

    @staticmethod
    def forward(ctx, module, value, sizes, starts, locations, weights):
        ctx.module = module
        ctx.save_for_backward(value, sizes, starts, locations, weights)
        step = min(value.shape[0], 64)
        return module.ms_deform_attn_forward(value, sizes, starts, locations, weights, step)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        saved = ctx.saved_tensors
        step = min(saved[0].shape[0], 64)
        d_value, d_locations, d_weights = ctx.module.ms_deform_attn_backward(
            *saved, gradient.contiguous(), step
        )
        return None, d_value, None, None, d_locations, d_weights


class Classic:
    """Calls such a module, or mmcv's function, with what it wants to have in tensors.

    These kernels are for float32 (and float64): other dtypes are cast, as detrex does, and the
    casts are part of the time.
    """

    def __init__(self, apply: Callable[..., Tensor]):
        self._apply = apply
        self._levels = {}

    def __call__(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        sizes, starts = self._level_tensors(tuple(shapes), value.device)
        exact = locations.dtype
        output = self._apply(value.to(exact), sizes, starts, locations, weights.to(exact))
        return output.to(value.dtype)

    def _level_tensors(self, shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
        """Made once: a model has them at hand."""
        key = (shapes, device)
        if key not in self._levels:
            sizes = torch.tensor(shapes, device=device)
            starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
            self._levels[key] = sizes, starts
        return self._levels[key]


def _classic(module_name: str) -> Function:
    module = importlib.import_module(module_name)
    module.ms_deform_attn_forward  # an AttributeError says that it has none
    return Classic(partial(ClassicFunction.apply, module))


def _mmcv() -> Function:
    function = importlib.import_module(
        "mmcv.ops.multi_scale_deform_attn"
    ).MultiScaleDeformableAttnFunction

    def apply(value: Tensor, *others: Tensor) -> Tensor:
        return function.apply(value, *others, min(value.shape[0], 64))

    return Classic(apply)


def _hub() -> Function:
    """Hugging Face's build of the authors' kernels, if it was fetched before."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the package is imported
    module = importlib.import_module("kernels").get_kernel("kernels-community/deformable-detr")
    return Classic(partial(ClassicFunction.apply, module))


def own(instructions: Sequence[str] = ()) -> list[Implementation]:
    """Ours, as it comes, and with each of some instruction sets of the CPU.

    Raises:
        RuntimeError: instructions are named, and the extension is not built.
        ValueError: this CPU or build does not have them.
    """
    if not instructions:
        return [Implementation(OURS, multi_scale_deformable_attention)]
    best = extension.cpu_instructions()
    for name in instructions:
        extension.cpu_instructions(name)  # raises where it is not there
    extension.cpu_instructions(best)
    named = {OURS: best, **{f"{OURS}, {name}": name for name in instructions}}
    return [
        Implementation(
            title, multi_scale_deformable_attention, partial(extension.cpu_instructions, name)
        )
        for title, name in named.items()
    ]


def others(device_type: str) -> tuple[list[Implementation], dict[str, str]]:
    """The grid_sample form, and, for "cuda", what else is installed.

    Returns:
        implementations, and for each that is not there the reason.
    """
    found, missing = [Implementation(GRID_SAMPLE, grid_sample)], {}
    if device_type != "cuda":
        return found, missing
    sources = {name: partial(_classic, module) for name, module in CLASSIC.items()}
    sources |= {"mmcv's operation": _mmcv, "kernels-community/deformable-detr": _hub}
    for name, load in sources.items():
        try:
            found.append(Implementation(name, load()))
        except Exception as error:  # other people's packages fail to load in many ways
            missing[name] = f"{error}".splitlines()[0]
    return found, missing
