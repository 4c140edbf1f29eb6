"""Models that look like those known here, and are not: what to tell who tries to convert them."""

from collections.abc import Mapping

from torch import Tensor

# Name of a parameter -> the model it is a mark of; the first one found counts.
_MARKS = {
    "transformer.pos_trans.weight": "two-stage Deformable DETR or two-stage DAB-Deformable-DETR, "
    "whose contents are made of the encoder's boxes",
    "transformer.reference_points.weight": "Deformable DETR, which has points instead of anchors",
    "query_embed.weight": "DETR, Conditional DETR or the like (queries without anchors)",
    "transformer.enc_output.weight": "a two-stage deformable model whose contents are the "
    "encoder's tokens (detrex's two-stage Deformable DETR or two-stage DAB-Deformable-DETR)",
    "transformer.level_embed": "a deformable model (several feature levels)",
    "transformer.level_embeds": "a deformable model (several feature levels)",
}
_KNOWN_QUERIES = ("refpoint_embed.weight", "transformer.tgt_embed.weight")
_LEVELS = 4


def describe_relative(state: Mapping[str, Tensor]) -> str | None:
    """What a state_dict of no known format looks like; None where nothing can be told."""
    levels = len(state.get("transformer.level_embeds", ()))
    if levels not in (0, _LEVELS) and any(name in state for name in _KNOWN_QUERIES):
        return f"a detrex model with {levels} feature levels; {_LEVELS} can be converted"
    return next((text for name, text in _MARKS.items() if name in state), None)
