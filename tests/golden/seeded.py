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

_V2 = "dn_dab_deformable_detr_r50"
_ENCODER_ONLY = "dn_dab_deformable_detr_deformable_encoder_only_r50"
# Of DAB-Deformable-DETR, where the list is DN-Deformable-DETR's.
_WIDER_CONTENT = {"tgt_embed.weight": (300, 256)}

# The list of a variant's names, and what its state_dict has more (first) and less (second). "r101"
# in a variant's name deepens the backbone. DC5 has the very same names and shapes as C5, v2 those
# of the DN-DETR repository's DINO without its second stage.
_LISTS: dict[str, tuple[str, dict[str, tuple[int, ...]], tuple[str, ...]]] = {
    "dn_dab_detr_r50": ("dn_dab_detr_r50", {}, ()),
    "dn_dab_detr_r50_dc5": ("dn_dab_detr_r50", {}, ()),
    "dn_dab_detr_r50_dc5_3pat": (
        "dn_dab_detr_r50",
        {"transformer.patterns.weight": (3, 256)},
        (),
    ),
    "dn_dab_detr_r101_dc5_3pat": (
        "dn_dab_detr_r50",
        {"transformer.patterns.weight": (3, 256)},
        (),
    ),
    "dab_detr_r50": ("dn_dab_detr_r50", {}, ("label_enc.weight",)),
    _V2: (_V2, {}, ()),
    "dab_deformable_detr_r50": (_V2, _WIDER_CONTENT, ("label_enc.weight",)),
    _ENCODER_ONLY: (_ENCODER_ONLY, {}, ()),
    _ENCODER_ONLY.replace("r50", "r101"): (_ENCODER_ONLY, {}, ()),
    "dn_dab_dino_deformable_detr_r50": ("dn_dab_dino_deformable_detr_r50", {}, ()),
    "dino_r50_4scale": ("dino_r50_4scale", {}, ()),
    "detrex_dn_detr_r50": ("detrex_dn_detr_r50", {}, ()),
    "detrex_dn_deformable_detr_r50": ("detrex_dn_deformable_detr_r50", {}, ()),
    "detrex_dab_deformable_detr_r50": (
        "detrex_dn_deformable_detr_r50",
        _WIDER_CONTENT,
        ("denoising_generator.label_encoder.weight",),
    ),
    "detrex_dino_r50_4scale": ("detrex_dino_r50_4scale", {}, ()),
}
# Those with reference outputs.
VARIANTS = tuple(v for v in _LISTS if not v.startswith("detrex") and "_r101" not in v)


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
    """Name -> shape of every entry of the authors' state_dict, tied ones under all their names.

    Args:
        variant: one of `_LISTS`; detrex's models are called "detrex_" and by their config's name.
    """
    listed, more, less = _LISTS[variant]
    shapes = listed_shapes(f"{listed}.txt")
    backbone = "detrex_dn_detr_r50" if variant.startswith("detrex") else "dn_dab_detr_r50"
    for name, shape in listed_shapes(f"{backbone}.txt").items():
        if name.startswith("backbone."):
            shapes[name] = shape
            if "_r101" in variant and "layer3.5." in name:
                longer = (name.replace("layer3.5.", f"layer3.{i}.") for i in range(6, 23))
                shapes.update(dict.fromkeys(longer, shape))
    return {**{name: shapes[name] for name in shapes if name not in less}, **more}


def listed_shapes(file_name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every line of a list beside this file; "{0..5}" stands for six lines."""
    shapes = {}
    for line in (_FOLDER / file_name).read_text().splitlines():
        name, dimensions = re.match(r"(\S+) \(([\d, ]*)\)", line).groups()
        shape = tuple(int(n) for n in dimensions.replace(" ", "").split(",") if n)
        first, last = re.search(r"{(\d)\.\.(\d)}|$", name).groups(default="0")
        for number in range(int(first), int(last) + 1):
            shapes[re.sub(r"{.*}", str(number), name)] = shape
    return shapes


def published_state_dict(variant: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The authors' state_dict with the weights the reference outputs were computed from.

    Args:
        variant: see `published_shapes`.
    """
    return dict(_seeded_state_dict(variant, seed))


@lru_cache(maxsize=1)  # many tests ask for the same one, which takes a second; 180 MB
def _seeded_state_dict(variant: str, seed: int) -> dict[str, torch.Tensor]:
    state = {}
    for name, shape in published_shapes(variant).items():
        source = name
        if variant == "dino_r50_4scale":  # all layers have the same heads
            source = re.sub(r"((?:class|bbox)_embed)\.\d", r"\1.0", name)
        state[name] = torch.from_numpy(seeded_array(source, shape, seed))
    return state


def golden(variant: str) -> dict[str, np.ndarray]:
    """The authors' outputs for `published_state_dict(variant)`; README.md explains the arrays.

    Args:
        variant: one of `VARIANTS`.
    """
    with np.load(_FOLDER / f"{variant}_seed0.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}
