"""DINO: anchors come from the encoder.

https://github.com/IDEA-Research/DINO (heads shared by all layers), IDEA-Research/detrex,
projects/dino (a head for every layer, the seventh being the encoder's), and IDEA-Research/DN-DETR,
models/dn_dab_dino_deformable_detr (a contribution: as detrex's, in a DN-Deformable-DETR).
"""

import torch
from torch import Tensor

from dn_detr.checkpoint.formats.deformable import (
    DETREX_LAYERS,
    DETREX_LEVELS,
    FIXED,
    OFFICIAL_LAYERS,
)
from dn_detr.checkpoint.formats.parts import SHARED, TIED_HEADS
from dn_detr.checkpoint.formats.table import Adjustment, Format, Rules, any_shape

_PROPOSALS: Rules = (
    (r"transformer\.tgt_embed\.weight", r"queries.content"),
    (r"transformer\.enc_output\.(\w+)", r"queries.projection.\1"),
    (r"transformer\.enc_output_norm\.(\w+)", r"queries.norm.\1"),
    (r"label_enc\.weight", r"queries.label_embed.weight"),
)
_FINAL_NORM: Rules = ((r"transformer\.decoder\.norm\.(\w+)", r"decoder.norm.\1"),)
_SEVENTH_HEAD: Rules = ((r"(class_embed|bbox_embed)\.6\.(.+)", r"queries.\1.\2"),)

_OFFICIAL: Rules = (
    *OFFICIAL_LAYERS,
    (r"(class_embed|bbox_embed)\.0\.(.+)", r"heads.\1.\2"),
    (r"transformer\.enc_out_(class_embed|bbox_embed)\.(.+)", r"queries.\1.\2"),
    *SHARED,
    *_FINAL_NORM,
    *_PROPOSALS,
)
_OFFICIAL_TIED: Rules = (
    *TIED_HEADS,
    (r"(class_embed|bbox_embed)\.[1-9]\d*\.(.+)", r"\1.0.\2"),
)
_DETREX: Rules = (*DETREX_LAYERS, *_SEVENTH_HEAD, *SHARED, *_FINAL_NORM, *_PROPOSALS)
_PORT: Rules = (*OFFICIAL_LAYERS, *_SEVENTH_HEAD, *SHARED, *_PROPOSALS)


def _first_row(rows: Tensor) -> Tensor:
    return rows[:1].clone()


def _with_zero_row(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.zeros_like(rows[:1])])


_OBJECTNESS = Adjustment(
    names=r"queries\.class_embed\.\w+",
    change=_first_row,
    text="row 0 of the encoder's class head kept: it tells objects from background",
)
_UNKNOWN_LABEL = Adjustment(
    names=r"queries\.label_embed\.weight",
    change=_with_zero_row,
    text='a row of zeros appended to the label embedding, for "unknown", which DINO never uses',
)

FORMATS = {
    "dino": Format(
        title="official DINO",
        model="dino",
        required=any_shape(
            "transformer.level_embed",
            "transformer.tgt_embed.weight",
            "transformer.enc_output.weight",
            "transformer.enc_out_class_embed.weight",
            "transformer.decoder.norm.weight",
            "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
            "label_enc.weight",
        ),
        rules=_OFFICIAL,
        tied=_OFFICIAL_TIED,
    ),
    "dn_dino": Format(
        title="DN-DETR repository's DINO",
        model="dn_dino",
        required=any_shape(
            "transformer.level_embed",
            "transformer.tgt_embed.weight",
            "transformer.enc_output.weight",
            "transformer.decoder.query_scale.layers.0.weight",
            "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
            "class_embed.6.weight",
            "label_enc.weight",
        ),
        rules=_PORT,
        tied=TIED_HEADS,
        adjustments=(_OBJECTNESS,),
        without_effect=FIXED,
    ),
    "detrex_dino": Format(
        title="detrex DINO",
        model="dino_detrex",
        required={
            **DETREX_LEVELS,
            **any_shape(
                "transformer.tgt_embed.weight",
                "transformer.enc_output.weight",
                "transformer.decoder.norm.weight",
                "transformer.decoder.layers.0.attentions.1.sampling_offsets.weight",
                "class_embed.6.weight",
                "label_enc.weight",
            ),
        },
        rules=_DETREX,
        tied=TIED_HEADS,
        adjustments=(_UNKNOWN_LABEL,),
    ),
}
