"""Necks, encoders, decoders, query sources, heads, matcher and criterion in plain PyTorch.

A detector is a choice of these parts; `structures` names what travels between them.
"""

from dn_detr.modeling.criterion import SetCriterion
from dn_detr.modeling.dab_decoder import DABDecoder, DABDecoderLayer
from dn_detr.modeling.decoder import AnchorDecoder
from dn_detr.modeling.deformable_decoder import DeformableDecoder, DeformableDecoderLayer
from dn_detr.modeling.encoder import (
    DABEncoder,
    DABEncoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
)
from dn_detr.modeling.heads import DetectionHeads
from dn_detr.modeling.matcher import HungarianMatcher
from dn_detr.modeling.neck import MultiLevelNeck, SingleLevelNeck
from dn_detr.modeling.queries import AnchorQueries, ProposalQueries
from dn_detr.modeling.structures import Predictions, Queries, Tokens

__all__ = [
    "AnchorDecoder",
    "AnchorQueries",
    "DABDecoder",
    "DABDecoderLayer",
    "DABEncoder",
    "DABEncoderLayer",
    "DeformableDecoder",
    "DeformableDecoderLayer",
    "DeformableEncoder",
    "DeformableEncoderLayer",
    "DetectionHeads",
    "HungarianMatcher",
    "MultiLevelNeck",
    "Predictions",
    "ProposalQueries",
    "Queries",
    "SetCriterion",
    "SingleLevelNeck",
    "Tokens",
]
