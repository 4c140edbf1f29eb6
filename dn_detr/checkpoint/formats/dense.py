"""DN-DETR and DAB-DETR: one feature level, dense attention.

https://github.com/IDEA-Research/DN-DETR, models/DN_DAB_DETR; IDEA-Research/DAB-DETR,
models/DAB_DETR; IDEA-Research/detrex, projects/dn_detr and projects/dab_detr.
"""

from dn_detr.checkpoint.formats.parts import (
    BACKBONE,
    CROSS,
    DECODER_LAYER,
    DETREX_FFN,
    DETREX_NORMS,
    ENCODER_LAYER,
    LAYER,
    OFFICIAL_FFN,
    SELF,
    SHARED,
    TIED_HEADS,
)
from dn_detr.checkpoint.formats.table import Format, Rules, Shape, any_shape

_SINGLE_LEVEL: Rules = (
    (r"input_proj\.(\w+)", r"neck.projection.\1"),
    (r"transformer\.encoder\.query_scale\.(.+)", r"encoder.position_scale.\1"),
)

# The decoder and the queries are those of the model with a deformable encoder, too.
OFFICIAL_DECODER: Rules = (
    *SHARED,
    *OFFICIAL_FFN,
    (LAYER + r"(norm\d)\.(\w+)", r"\1.layers.\2.\3.\4"),
    (DECODER_LAYER + r"sa_qcontent_proj\.(\w+)", SELF + r"query_content.\2"),
    (DECODER_LAYER + r"sa_qpos_proj\.(\w+)", SELF + r"query_position.\2"),
    (DECODER_LAYER + r"sa_kcontent_proj\.(\w+)", SELF + r"key_content.\2"),
    (DECODER_LAYER + r"sa_kpos_proj\.(\w+)", SELF + r"key_position.\2"),
    (DECODER_LAYER + r"sa_v_proj\.(\w+)", SELF + r"value.\2"),
    (DECODER_LAYER + r"self_attn\.out_proj\.(\w+)", SELF + r"output.\2"),
    (DECODER_LAYER + r"ca_qcontent_proj\.(\w+)", CROSS + r"query_content.\2"),
    (DECODER_LAYER + r"ca_qpos_proj\.(\w+)", CROSS + r"query_position.\2"),
    (DECODER_LAYER + r"ca_kcontent_proj\.(\w+)", CROSS + r"key_content.\2"),
    (DECODER_LAYER + r"ca_kpos_proj\.(\w+)", CROSS + r"key_position.\2"),
    (DECODER_LAYER + r"ca_v_proj\.(\w+)", CROSS + r"value.\2"),
    (DECODER_LAYER + r"ca_qpos_sine_proj\.(\w+)", CROSS + r"query_sine.\2"),
    (r"transformer\.decoder\.norm\.(\w+)", r"decoder.norm.\1"),
    (r"refpoint_embed\.weight", r"queries.anchors"),
    (r"label_enc\.weight", r"queries.label_embed.weight"),
)

OFFICIAL: Rules = (
    *BACKBONE,
    *_SINGLE_LEVEL,
    (ENCODER_LAYER + r"self_attn\.(.+)", r"encoder.layers.\1.self_attn.\2"),
    (DECODER_LAYER + r"cross_attn\.out_proj\.(\w+)", CROSS + r"output.\2"),
    *OFFICIAL_DECODER,
)

_ATTENTION = DECODER_LAYER + r"attentions\.0\."
_CROSS_ATTENTION = DECODER_LAYER + r"attentions\.1\."

DETREX: Rules = (
    *BACKBONE,
    *_SINGLE_LEVEL,
    *SHARED,
    *DETREX_FFN,
    *DETREX_NORMS,
    (ENCODER_LAYER + r"attentions\.0\.attn\.(.+)", r"encoder.layers.\1.self_attn.\2"),
    (LAYER + r"ffns\.0\.layers\.0\.1\.(\w+)", r"\1.layers.\2.ffn.activation.\3"),
    (_ATTENTION + r"query_content_proj\.(\w+)", SELF + r"query_content.\2"),
    (_ATTENTION + r"query_pos_proj\.(\w+)", SELF + r"query_position.\2"),
    (_ATTENTION + r"key_content_proj\.(\w+)", SELF + r"key_content.\2"),
    (_ATTENTION + r"key_pos_proj\.(\w+)", SELF + r"key_position.\2"),
    (_ATTENTION + r"value_proj\.(\w+)", SELF + r"value.\2"),
    (_ATTENTION + r"out_proj\.(\w+)", SELF + r"output.\2"),
    (_CROSS_ATTENTION + r"query_content_proj\.(\w+)", CROSS + r"query_content.\2"),
    (_CROSS_ATTENTION + r"query_pos_proj\.(\w+)", CROSS + r"query_position.\2"),
    (_CROSS_ATTENTION + r"key_content_proj\.(\w+)", CROSS + r"key_content.\2"),
    (_CROSS_ATTENTION + r"key_pos_proj\.(\w+)", CROSS + r"key_position.\2"),
    (_CROSS_ATTENTION + r"value_proj\.(\w+)", CROSS + r"value.\2"),
    (_CROSS_ATTENTION + r"query_pos_sine_proj\.(\w+)", CROSS + r"query_sine.\2"),
    (_CROSS_ATTENTION + r"out_proj\.(\w+)", CROSS + r"output.\2"),
    (r"transformer\.decoder\.post_norm_layer\.(\w+)", r"decoder.norm.\1"),
    (r"anchor_box_embed\.weight", r"queries.anchors"),
    (r"denoising_generator\.label_encoder\.weight", r"queries.label_embed.weight"),
)
_DETREX_TIED: Rules = (
    *TIED_HEADS,
    (r"(transformer\..+\.ffns\.0)\.activation\.(\w+)", r"\1.layers.0.1.\2"),
)

_NAMES: dict[str, Shape] = {
    "input_proj.weight": (None, None, None, None),  # one level, without a norm
    **any_shape(
        "transformer.encoder.query_scale.layers.0.weight",
        "transformer.decoder.ref_point_head.layers.0.weight",
    ),
}
_OFFICIAL_NAMES: dict[str, Shape] = {
    **_NAMES,
    "refpoint_embed.weight": (None, 4),
    "transformer.decoder.layers.0.ca_qpos_sine_proj.weight": None,
}
_DETREX_NAMES: dict[str, Shape] = {
    **_NAMES,
    "anchor_box_embed.weight": (None, 4),
    "transformer.decoder.layers.0.attentions.1.query_pos_sine_proj.weight": None,
}
_LABELS, _DETREX_LABELS = "label_enc.weight", "denoising_generator.label_encoder.weight"
_MULTI_LEVEL_ONLY = frozenset({"num_feature_levels", "enc_n_points", "dec_n_points", "two_stage"})

FORMATS = {
    "dn_detr": Format(
        title="official DN-DETR",
        model="dn_detr",
        required={**_OFFICIAL_NAMES, _LABELS: None},
        rules=OFFICIAL,
        tied=TIED_HEADS,
        without_effect=_MULTI_LEVEL_ONLY,
    ),
    "dab_detr": Format(
        title="official DAB-DETR",
        model="dab_detr",
        required=_OFFICIAL_NAMES,
        absent=(_LABELS,),
        rules=OFFICIAL,
        tied=TIED_HEADS,
        without_effect=_MULTI_LEVEL_ONLY,
    ),
    "detrex_dn_detr": Format(
        title="detrex DN-DETR",
        model="dn_detr",
        required={**_DETREX_NAMES, _DETREX_LABELS: None},
        rules=DETREX,
        tied=_DETREX_TIED,
    ),
    "detrex_dab_detr": Format(
        title="detrex DAB-DETR",
        model="dab_detr",
        required=_DETREX_NAMES,
        absent=(_DETREX_LABELS,),
        rules=DETREX,
        tied=_DETREX_TIED,
    ),
}
