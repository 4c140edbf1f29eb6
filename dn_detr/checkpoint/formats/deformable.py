"""DN-Deformable-DETR and DAB-Deformable-DETR: several feature levels, deformable attention.

https://github.com/IDEA-Research/DN-DETR, models/dn_dab_deformable_detr ("v2") and
models/dn_dab_deformable_detr_deformable_encoder_only; IDEA-Research/DAB-DETR,
models/dab_deformable_detr; IDEA-Research/detrex, projects/dn_deformable_detr and
projects/dab_deformable_detr.

The DN-DETR repository's DINO without its second stage has v2's names, and evaluates as v2.
"""

from dn_detr.checkpoint.formats.dense import OFFICIAL_DECODER
from dn_detr.checkpoint.formats.parts import (
    BACKBONE,
    CROSS,
    DECODER_LAYER,
    DETREX_FFN,
    DETREX_NORMS,
    ENCODER_LAYER,
    OFFICIAL_FFN,
    SELF,
    SHARED,
    TIED_HEADS,
)
from dn_detr.checkpoint.formats.table import Format, Rules, Shape, any_shape


def _deformable_attention(layer: str, target: str) -> Rules:
    """Rules for one attention block, published as `layer`."""
    names = {
        "value_proj": "value",
        "sampling_offsets": "offsets",
        "attention_weights": "weights",
        "output_proj": "output",
    }
    return tuple((rf"{layer}{old}\.(\w+)", rf"{target}{new}.\2") for old, new in names.items())


_SELF_IN_ENCODER = r"encoder.layers.\1.self_attn."

_OFFICIAL_ENCODER: Rules = (
    *BACKBONE,
    (r"input_proj\.(\d+)\.([01])\.(\w+)", r"neck.projections.\1.\2.\3"),
    (r"transformer\.level_embed", r"neck.level_embed"),
    *_deformable_attention(ENCODER_LAYER + r"self_attn\.", _SELF_IN_ENCODER),
)
# Norms bear their numbers in the order of the source code, where cross-attention stands first;
# self-attention, with norm2, runs first.
OFFICIAL_LAYERS: Rules = (
    *_OFFICIAL_ENCODER,
    *OFFICIAL_FFN,
    (ENCODER_LAYER + r"(norm[12])\.(\w+)", r"encoder.layers.\1.\2.\3"),
    (DECODER_LAYER + r"norm2\.(\w+)", r"decoder.layers.\1.norm1.\2"),
    (DECODER_LAYER + r"norm1\.(\w+)", r"decoder.layers.\1.norm2.\2"),
    (DECODER_LAYER + r"norm3\.(\w+)", r"decoder.layers.\1.norm3.\2"),
    (DECODER_LAYER + r"self_attn\.in_proj_(\w+)", SELF + r"in_proj.\2"),
    (DECODER_LAYER + r"self_attn\.out_proj\.(\w+)", SELF + r"output.\2"),
    *_deformable_attention(DECODER_LAYER + r"cross_attn\.", CROSS),
)
DETREX_LAYERS: Rules = (
    *BACKBONE,
    (r"neck\.convs\.(\d+)\.conv\.(\w+)", r"neck.projections.\1.0.\2"),
    (r"neck\.convs\.(\d+)\.norm\.(\w+)", r"neck.projections.\1.1.\2"),
    (r"neck\.extra_convs\.0\.conv\.(\w+)", r"neck.projections.3.0.\1"),
    (r"neck\.extra_convs\.0\.norm\.(\w+)", r"neck.projections.3.1.\1"),
    (r"transformer\.level_embeds", r"neck.level_embed"),
    *DETREX_FFN,
    *DETREX_NORMS,
    *_deformable_attention(ENCODER_LAYER + r"attentions\.0\.", _SELF_IN_ENCODER),
    (DECODER_LAYER + r"attentions\.0\.attn\.in_proj_(\w+)", SELF + r"in_proj.\2"),
    (DECODER_LAYER + r"attentions\.0\.attn\.out_proj\.(\w+)", SELF + r"output.\2"),
    *_deformable_attention(DECODER_LAYER + r"attentions\.1\.", CROSS),
)

_QUERIES: Rules = (
    (r"tgt_embed\.weight", r"queries.content"),
    (r"refpoint_embed\.weight", r"queries.anchors"),
)
_OFFICIAL: Rules = (
    *OFFICIAL_LAYERS,
    *SHARED,
    *_QUERIES,
    (r"label_enc\.weight", r"queries.label_embed.weight"),
)
# "label_encoder" alone is what detrex's converter of official weights writes; what detrex offers
# comes from it.
_DETREX: Rules = (
    *DETREX_LAYERS,
    *SHARED,
    *_QUERIES,
    (r"(?:denoising_generator\.)?label_encoder\.weight", r"queries.label_embed.weight"),
)
_ENCODER_ONLY: Rules = (
    *_OFFICIAL_ENCODER,
    (DECODER_LAYER + r"ca_out_v_proj\.(\w+)", CROSS + r"output.\2"),
    (DECODER_LAYER + r"lvl_attn\.(\w+)", r"decoder.layers.\1.level_weights.\2"),
    *OFFICIAL_DECODER,
)

_NAMES: dict[str, Shape] = {
    "refpoint_embed.weight": (None, 4),
    **any_shape(
        "tgt_embed.weight",
        "class_embed.0.weight",
        "transformer.decoder.query_scale.layers.0.weight",
    ),
}
_OFFICIAL_NAMES: dict[str, Shape] = {
    **_NAMES,
    **any_shape(
        "transformer.level_embed",
        "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
    ),
}
# Four levels: detrex numbers those behind the backbone's from 0 again, and the rules have to know
# where they begin.
DETREX_LEVELS: dict[str, Shape] = {"transformer.level_embeds": (4, None)}
_DETREX_NAMES: dict[str, Shape] = {
    **_NAMES,
    **DETREX_LEVELS,
    **any_shape("transformer.decoder.layers.0.attentions.1.sampling_offsets.weight"),
}
_LABELS = "label_enc.weight"
_DETREX_LABELS = ("denoising_generator.label_encoder.weight", "label_encoder.weight")

# These models have ReLU and a temperature of 10000, whatever the arguments say.
FIXED = frozenset({"transformer_activation", "pe_temperatureH", "pe_temperatureW"})


def _detrex_dn(name: str, labels: str) -> Format:
    return Format(
        title=f"detrex {name}",
        model="dn_deformable_detr",
        required={**_DETREX_NAMES, labels: None},
        rules=_DETREX,
        tied=TIED_HEADS,
    )


FORMATS = {
    "dn_deformable_detr": Format(
        title="official DN-Deformable-DETR",
        model="dn_deformable_detr",
        required={**_OFFICIAL_NAMES, _LABELS: None},
        rules=_OFFICIAL,
        tied=TIED_HEADS,
        without_effect=FIXED,
    ),
    "dn_deformable_encoder": Format(
        title="official DN-Deformable-DETR (deformable encoder only)",
        model="dn_deformable_encoder",
        required={
            "refpoint_embed.weight": (None, 4),
            **any_shape(
                "transformer.level_embed",
                "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
                "transformer.decoder.layers.0.ca_qpos_sine_proj.weight",
                "transformer.decoder.layers.0.lvl_attn.weight",
                _LABELS,
            ),
        },
        rules=_ENCODER_ONLY,
        tied=TIED_HEADS,
        without_effect=frozenset({"dec_n_points", "two_stage"}),
    ),
    "dab_deformable_detr": Format(
        title="official DAB-Deformable-DETR",
        model="dab_deformable_detr",
        required=_OFFICIAL_NAMES,
        absent=(_LABELS,),
        rules=_OFFICIAL,
        tied=TIED_HEADS,
        without_effect=FIXED,
    ),
    "detrex_dn_deformable_detr": _detrex_dn("DN-Deformable-DETR", _DETREX_LABELS[0]),
    "detrex_dn_deformable_detr_converted": _detrex_dn(
        "DN-Deformable-DETR (converted)", _DETREX_LABELS[1]
    ),
    "detrex_dab_deformable_detr": Format(
        title="detrex DAB-Deformable-DETR",
        model="dab_deformable_detr",
        required=_DETREX_NAMES,
        absent=_DETREX_LABELS,
        rules=_DETREX,
        tied=TIED_HEADS,
    ),
}
