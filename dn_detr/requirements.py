"""What cannot be declared in the package's metadata: detectron2, and how to install it.

detectron2 has no release on a package index, and an index refuses metadata that names an address,
so it is checked for here, at import. This file needs the standard library only: the set-up script
reads the pinned commit from it before anything is installed.
"""

from __future__ import annotations

import importlib
import warnings
from importlib import metadata

DETECTRON2_REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
DETECTRON2_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
DETECTRON2_SOURCE = f"git+{DETECTRON2_REPOSITORY}@{DETECTRON2_COMMIT}"

# detectron2's build imports torch, so torch comes first and build isolation is off. Its visualizer
# imports cv2, which it does not declare.
DETECTRON2_INSTALL_COMMAND = (
    "pip install setuptools wheel opencv-python-headless"
    f" && pip install --no-build-isolation '{DETECTRON2_SOURCE}'"
)


def require_detectron2() -> None:
    """Makes sure that detectron2 imports; call it before the first import from detectron2.

    Raises:
        ImportError: detectron2 does not import. The message names the reason, the torch that is
            installed (detectron2 is built against it) and the command that installs detectron2.
    """
    # detectron2 uses torch.jit.script at import; its users can do nothing about that.
    warnings.filterwarnings("ignore", r".*torch\.jit\.script.*deprecated", FutureWarning)
    try:
        # Its layers, for they fail where torch and torchvision do not fit, or cannot be had;
        # whoever uses any of detectron2 imports them.
        importlib.import_module("detectron2.layers")
    except Exception as error:  # a broken build raises OSError or RuntimeError as well
        raise ImportError(
            f"This part of dn_detr needs detectron2, which does not import: "
            f"{type(error).__name__}: {error}\n"
            f"Install it next to the torch that you use (found: {_torch_version()}):\n"
            f"    {DETECTRON2_INSTALL_COMMAND}\n"
            f"dn_detr.layers, dn_detr.denoising and dn_detr.modeling work without it."
        ) from error


def _torch_version() -> str:
    try:
        return f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        return "no torch; install it first: pip install torch torchvision"
