"""The operators behind `multi_scale_deformable_attention`, registered with `torch.library`.

Level sizes and points per level are integers of the host: nothing waits for a device, and compiled
or exported programs hold one node. Kernels for CPU and CUDA come from dn_detr/layers/csrc; any
other device, and a missing build, get the reference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dn_detr.layers.deformable import reference
from dn_detr.layers.deformable.extension import OPERATOR, say_fallback

_INPUTS = (
    "Tensor value, SymInt[] shapes, SymInt[] points_per_level, Tensor locations, Tensor weights"
)
_BACKWARD = f"{OPERATOR}_backward"

_library = torch.library.Library("dn_detr", "FRAGMENT")
for _name, _schema in (
    (OPERATOR, f"({_INPUTS}) -> Tensor"),
    (_BACKWARD, f"(Tensor gradient, {_INPUTS}) -> (Tensor, Tensor, Tensor)"),
):
    torch.library.define(_name, _schema, lib=_library, tags=torch.Tag.pt2_compliant_tag)

forward = torch.ops.dn_detr.multi_scale_deformable_attention.default
backward = torch.ops.dn_detr.multi_scale_deformable_attention_backward.default


def _pairs(shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(shapes[::2], shapes[1::2]))


def _forward_fallback(value, shapes, points_per_level, locations, weights):
    say_fallback(value.device.type)
    return reference.by_sampling(value, _pairs(shapes), points_per_level, locations, weights)


def _backward_fallback(gradient, value, shapes, points_per_level, locations, weights):
    return reference.by_sampling_backward(
        gradient, value, _pairs(shapes), points_per_level, locations, weights
    )


_library.impl(OPERATOR, _forward_fallback, "CompositeExplicitAutograd")
_library.impl(_BACKWARD, _backward_fallback, "CompositeExplicitAutograd")


@torch.library.register_fake(OPERATOR, lib=_library)
def _(value, shapes, points_per_level, locations, weights):
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, locations.shape[1], heads * channels)


@torch.library.register_fake(_BACKWARD, lib=_library)
def _(gradient, value, shapes, points_per_level, locations, weights):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, locations, weights))


def _save(ctx, inputs, output):
    *tensors, ctx.shapes, ctx.points_per_level = _sort(inputs)
    ctx.save_for_backward(*tensors)


def _sort(inputs: tuple) -> list:
    """The tensors first, then the two lists of integers."""
    return sorted(inputs, key=lambda argument: not isinstance(argument, Tensor))


def _gradients(ctx, gradient: Tensor):
    value, locations, weights = ctx.saved_tensors
    d_value, d_locations, d_weights = backward(
        gradient, value, ctx.shapes, ctx.points_per_level, locations, weights
    )
    return d_value, None, None, d_locations, d_weights


def _second_gradients(ctx, *gradients: Tensor):
    """Of the backward operator: by autograd through the reference that can be derived at will."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views end the derivation here, even where one of these was computed from another.
        saved = [
            tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
            for tensor in ctx.saved_tensors
        ]
        gradient, value, locations, weights = saved
        output = reference.by_gathering(
            value, _pairs(ctx.shapes), ctx.points_per_level, locations, weights
        )
        first = torch.autograd.grad(output, saved[1:], gradient, create_graph=True)
        of_gradient, of_value, of_locations, of_weights = torch.autograd.grad(
            first, saved, gradients, create_graph=create_graph, allow_unused=True
        )
    return of_gradient, of_value, None, None, of_locations, of_weights


torch.library.register_autograd(OPERATOR, _gradients, setup_context=_save, lib=_library)
torch.library.register_autograd(_BACKWARD, _second_gradients, setup_context=_save, lib=_library)


_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def autocast_dtype(value: Tensor) -> torch.dtype:
    """The dtype in which `value` is read here: autocast's, or its own (float64 stays as it is)."""
    device_type = value.device.type
    if value.dtype == torch.float64 or device_type not in _AUTOCAST_KEYS:
        return value.dtype
    if not torch.is_autocast_enabled(device_type):
        return value.dtype
    return torch.get_autocast_dtype(device_type)


def _register_autocast(key: str) -> None:
    """Lowers value, and nothing else: rounded locations ruin the result, weights cost little."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_call(value, shapes, points_per_level, locations, weights):
        dtype = autocast_dtype(value)
        if weights.dtype not in (dtype, torch.float64):
            weights = weights.float()
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return forward(value.to(dtype), shapes, points_per_level, locations, weights)

    _library.impl(OPERATOR, cast_and_call, key)


for _key in _AUTOCAST_KEYS.values():
    _register_autocast(_key)
