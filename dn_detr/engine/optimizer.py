"""Learning rates by parameter name."""

from __future__ import annotations

import functools
from typing import Callable


def backbone_lr_factor(factor: float = 0.1) -> Callable[[str], float]:
    """Returns the function that detectron2's `get_default_optimizer_params` asks for a factor.

    Args:
        factor: what the learning rate of the backbone is multiplied by. DETR and its successors
            train the backbone at a tenth (1e-5 beside 1e-4).

    Returns:
        parameter name -> `factor` for names below `backbone.`, else 1.
    """
    return functools.partial(_factor_of, factor=factor)


def _factor_of(name: str, factor: float) -> float:
    return factor if name.startswith("backbone.") else 1.0
