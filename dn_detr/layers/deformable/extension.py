"""The compiled kernels (dn_detr/layers/csrc), where they were built."""

import logging
from functools import cache

import torch

OPERATOR = "dn_detr::multi_scale_deformable_attention"

_BUILD = "pip install --no-build-isolation -e . (FORCE_CUDA=1 for CUDA on a machine without a GPU)"


def load_extension() -> str:
    """Loads the kernels, which register themselves; returns why not, or "" where they are there."""
    try:
        import dn_detr._C  # noqa: F401
    except ImportError as error:
        return "it was not built" if error.name == "dn_detr._C" else str(error)
    return ""


MISSING = load_extension()


def has_kernel(device_type: str) -> bool:
    """Whether tensors on devices of that type ("cpu", "cuda") have a compiled kernel."""
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR, key)


@cache
def say_fallback(device_type: str) -> None:
    """Logs, once for each type of device, that the reference takes the place of a kernel."""
    reason = MISSING or f"it was built without a kernel for {device_type}"
    logging.getLogger(__name__).warning(
        "Multi-scale deformable attention on %s runs in plain PyTorch, many times slower than the "
        "extension dn_detr._C: %s. To build it: %s",
        device_type,
        reason,
        _BUILD,
    )


def cpu_instructions(name: str | None = None) -> str:
    """The instruction set that the CPU kernels use: "avx512", "avx2" or "generic".

    At first it is the best that this CPU has, or what the environment variable
    DN_DETR_CPU_INSTRUCTIONS names.

    Args:
        name: the one to use from now on, for all threads; None changes nothing.

    Raises:
        RuntimeError: the extension is not built.
        ValueError: this CPU or this build does not have it.
    """
    if MISSING:
        raise RuntimeError(f"dn_detr._C is missing: {MISSING}. To build it: {_BUILD}")
    return torch.ops.dn_detr.cpu_instructions(name)
