"""The published reference outputs, and the weights and images they were computed from.

Weights are a function of (parameter name, shape, seed) alone, so nothing has to be shipped but
names and shapes: `published_state_dict` rebuilds the authors' state_dict, and `golden` holds what
the authors' code computed with it (README.md beside this file explains the arrays).
"""

import hashlib
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

_FOLDER = Path(__file__).parent
_TIED = (
    ("transformer.decoder.bbox_embed.", "bbox_embed."),
    ("transformer.decoder.class_embed.", "class_embed."),
)
_EMBEDDINGS = (
    "refpoint_embed",
    "tgt_embed",
    "label_enc",
    "patterns",
    "level_embed",
    "query_embed",
)
_QUERY_AND_KEY = ("qcontent_proj", "kcontent_proj", "qpos_proj", "kpos_proj", "qpos_sine_proj")
_OUTPUTS = ("out_proj", "output_proj", "linear2", "ca_out_v_proj")

# What a variant's state_dict has more (first) and less (second) than dn_dab_detr_r50.txt.
# DC5 has the very same names and shapes as C5.
_DIFFERENCES: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...]]] = {
    "dn_dab_detr_r50": ({}, ()),
    "dn_dab_detr_r50_dc5": ({}, ()),
    "dn_dab_detr_r50_dc5_3pat": ({"transformer.patterns.weight": (3, 256)}, ()),
    "dab_detr_r50": ({}, ("label_enc.weight",)),
}
VARIANTS = tuple(_DIFFERENCES)


def seeded_array(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """float32 array of `shape` for the published parameter `name`; tied names, equal arrays."""
    for alias, canonical in _TIED:
        name = name.replace(alias, canonical)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big")))
    uniform = generator.random(shape) * 2 - 1
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        array = 1 + 0.3 * uniform
    elif last == "running_mean":
        array = 0.1 * uniform
    elif "activation" in name:
        array = 0.25 + 0.1 * uniform
    elif any(part in name for part in _EMBEDDINGS):
        array = 1.5 * uniform
    elif len(shape) == 1 and last == "weight":
        # Norms; those that end a residual branch of the ResNet are damped.
        array = (1 + 0.1 * uniform) * (0.3 if ".bn3." in name else 1.0)
    elif "sampling_offsets.bias" in name:
        array = 2.0 * uniform
    elif "class_embed" in name and last == "bias":
        array = -2.0 + 0.5 * uniform
    elif len(shape) == 1:
        array = 0.1 * uniform
    else:
        array = _seeded_matrix(name, shape, uniform)
    return array.astype(np.float32)


def _seeded_matrix(name: str, shape: tuple[int, ...], uniform: np.ndarray) -> np.ndarray:
    array = uniform * np.sqrt((6.0 if len(shape) == 4 else 3.0) / int(np.prod(shape[1:])))
    if "in_proj_weight" in name:
        array[: 2 * shape[1]] *= 4.0  # peaky attention: queries and keys only
    elif any(part in name for part in _QUERY_AND_KEY):
        array *= 2.0
    elif any(part in name for part in _OUTPUTS) or "input_proj" in name:
        array *= 0.4
    return array


def seeded_image(height: int, width: int, seed: int, cell: int = 32) -> np.ndarray:
    """uint8 RGB image [3, height, width]: a random grid of `cell` pixels a square, plus noise."""
    rng = np.random.Generator(np.random.PCG64(seed))
    grid = rng.integers(0, 256, size=(3, -(-height // cell), -(-width // cell)))
    coarse = grid.repeat(cell, 1).repeat(cell, 2)[:, :height, :width]
    fine = rng.integers(-24, 25, size=(3, height, width))
    return np.clip(coarse + fine, 0, 255).astype(np.uint8)


@lru_cache(maxsize=None)
def published_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every entry of the authors' state_dict, tied ones under both names."""
    more, less = _DIFFERENCES[variant]
    shapes = listed_shapes("dn_dab_detr_r50.txt")
    return {**{name: shapes[name] for name in shapes if name not in less}, **more}


def listed_shapes(file_name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every line of a list beside this file."""
    shapes = {}
    for line in (_FOLDER / file_name).read_text().splitlines():
        name, dimensions = re.match(r"(\S+) \(([\d, ]*)\)", line).groups()
        shapes[name] = tuple(int(n) for n in dimensions.replace(" ", "").split(",") if n)
    return shapes


def published_state_dict(variant: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The authors' state_dict with the weights the reference outputs were computed from.

    Args:
        variant: one of `VARIANTS`.
    """
    shapes = published_shapes(variant)
    return {name: torch.from_numpy(seeded_array(name, shapes[name], seed)) for name in shapes}


def golden(variant: str) -> dict[str, np.ndarray]:
    """The authors' outputs for `published_state_dict(variant)`; README.md explains the arrays."""
    with np.load(_FOLDER / f"{variant}_seed0.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}
