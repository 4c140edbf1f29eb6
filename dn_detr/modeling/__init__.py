"""Necks, encoders, decoders, query sources, heads, matcher and criterion in plain PyTorch.

A detector is a choice of these parts; `structures` names what travels between them.
"""

from dn_detr.modeling.criterion import SetCriterion
from dn_detr.modeling.decoder import DABDecoder, DABDecoderLayer
from dn_detr.modeling.encoder import DABEncoder, DABEncoderLayer
from dn_detr.modeling.heads import DetectionHeads
from dn_detr.modeling.matcher import HungarianMatcher
from dn_detr.modeling.neck import SingleLevelNeck
from dn_detr.modeling.queries import AnchorQueries
from dn_detr.modeling.structures import Predictions, Queries, Tokens

__all__ = [
    "AnchorQueries",
    "DABDecoder",
    "DABDecoderLayer",
    "DABEncoder",
    "DABEncoderLayer",
    "DetectionHeads",
    "HungarianMatcher",
    "Predictions",
    "Queries",
    "SetCriterion",
    "SingleLevelNeck",
    "Tokens",
]
