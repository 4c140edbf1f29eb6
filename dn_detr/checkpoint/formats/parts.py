"""Rules that several families share: the ResNet, the heads, blocks of a transformer's layer."""

from dn_detr.checkpoint.formats.table import Rules

# torchvision's names behind "backbone.0.body." (official) or "backbone.body." (detrex, DC5 only);
# detrex's other models have detectron2's own names already.
_BODY = r"backbone\.(?:0\.)?body\."
BACKBONE: Rules = (
    (_BODY + r"conv1\.(\w+)", r"backbone.stem.conv1.\1"),
    (_BODY + r"bn1\.(\w+)", r"backbone.stem.conv1.norm.\1"),
    *(
        rule
        for layer in (1, 2, 3, 4)
        for block in [_BODY + rf"layer{layer}\.(\d+)\."]
        for target in [rf"backbone.res{layer + 1}.\1."]
        for rule in (
            (block + r"conv(\d)\.(\w+)", target + r"conv\2.\3"),
            (block + r"bn(\d)\.(\w+)", target + r"conv\2.norm.\3"),
            (block + r"downsample\.0\.(\w+)", target + r"shortcut.\2"),
            (block + r"downsample\.1\.(\w+)", target + r"shortcut.norm.\2"),
        )
    ),
    (r"backbone\.((?:stem|res\d)\..+)", r"backbone.\1"),
)

# Layer numbers are a pattern's first group (behind which block, where that varies, too).
ENCODER_LAYER = r"transformer\.encoder\.layers\.(\d+)\."
DECODER_LAYER = r"transformer\.decoder\.layers\.(\d+)\."
LAYER = r"transformer\.(encoder|decoder)\.layers\.(\d+)\."
SELF, CROSS = r"decoder.layers.\1.self_attn.", r"decoder.layers.\1.cross_attn."

# What all layers of a decoder share, and the heads.
SHARED: Rules = (
    (r"transformer\.decoder\.query_scale\.(.+)", r"decoder.position_scale.\1"),
    (r"transformer\.decoder\.ref_point_head\.(.+)", r"decoder.anchor_position.\1"),
    (r"transformer\.decoder\.ref_anchor_head\.(.+)", r"decoder.size_scale.\1"),
    (r"(class_embed|bbox_embed)\.(.+)", r"heads.\1.\2"),
    (r"transformer\.patterns\.weight", r"queries.patterns"),
)

OFFICIAL_FFN: Rules = ((LAYER + r"(linear\d|activation)\.(\w+)", r"\1.layers.\2.ffn.\3.\4"),)
_FFN = LAYER + r"ffns\.0\.layers\."
DETREX_FFN: Rules = (
    (_FFN + r"0\.0\.(\w+)", r"\1.layers.\2.ffn.linear1.\3"),
    (_FFN + r"1\.(\w+)", r"\1.layers.\2.ffn.linear2.\3"),
)
DETREX_NORMS: Rules = tuple(
    (LAYER + rf"norms\.{i}\.(\w+)", rf"\1.layers.\2.norm{i + 1}.\3") for i in range(3)
)

# Heads that the decoder has got a second reference to, for refinement and proposals.
TIED_HEADS: Rules = ((r"transformer\.decoder\.((?:class|bbox)_embed\..+)", r"\1"),)
