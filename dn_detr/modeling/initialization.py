"""Initialisation shared by encoders and decoders."""

from torch import nn


def xavier_uniform(module: nn.Module) -> None:
    """Xavier uniform for every parameter of two or more dimensions; the others keep what they have.

    It is what DETR and its descendants do to the whole transformer.
    """
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
