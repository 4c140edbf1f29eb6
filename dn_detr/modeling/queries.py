"""Query sources: what the decoder starts from.

Learned 4-D anchors with content (DAB-DETR), or anchors that the encoder proposes (DINO). With
denoising (DN-DETR), the noised queries go in front.
"""

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from dn_detr.denoising import NoisedTargets
from dn_detr.layers import inverse_sigmoid
from dn_detr.modeling.heads import box_head, check_num_classes, class_head
from dn_detr.modeling.structures import Predictions, Queries, Tokens

CONTENTS = ("unknown_label", "learned", "zeros")
ANCHOR_INITS = ("normal", "uniform_centers", "grid")


class QuerySource(nn.Module, ABC):
    """Puts noised ground truth in front of the matching queries that a subclass makes.

    The content of a denoising query is the embedding of its noised label; its anchor is its noised
    box. A slot without a target has zero content and zero logits.

    Args:
        embed_dim: D.
        num_classes: C; the label embedding has C + 1 rows, the last one is "unknown".
        labels: hold a label embedding. Without it there is no denoising (DAB-DETR,
            DAB-Deformable-DETR).
        indicator: the last channel of a content is 1 in denoising queries (DN-DETR), and label
            embeddings are one channel narrower.
        label_std: standard deviation of the first label embeddings; 1 as published. The smaller,
            the more of the first layers' output is what attention found.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        labels: bool = True,
        indicator: bool = True,
        label_std: float = 1.0,
    ):
        super().__init__()
        check_num_classes(num_classes)
        self.embed_dim = embed_dim
        self.indicator = indicator
        self.label_embed = None
        if labels:
            self.label_embed = nn.Embedding(num_classes + 1, embed_dim - int(indicator))
            nn.init.normal_(self.label_embed.weight, std=label_std)

    @abstractmethod
    def matching(self, memory: Tokens) -> Queries:
        """The matching queries of a batch."""

    def forward(self, memory: Tokens, noised: NoisedTargets | None = None) -> Queries:
        """Queries of a batch: ``[denoising slots | matching queries]``.

        Raises:
            ValueError: noised targets for queries without a label embedding.
        """
        queries = self.matching(memory)
        if self.label_embed is None:
            if noised is not None:
                raise ValueError(
                    "denoising needs a label embedding: set model.queries.labels=True "
                    "(or model.denoising=null)"
                )
            return queries
        content, anchors = queries.content, queries.anchors
        if noised is None:
            # Not one slot: but the label embedding takes part, for DistributedDataParallel.
            none = torch.empty(len(content), 0, dtype=torch.long, device=content.device)
            return replace(queries, content=torch.cat([self._embed(none, none.bool()), content], 1))
        valid = noised.valid[..., None]
        logits = inverse_sigmoid(noised.boxes).where(valid, 0)
        return replace(
            queries,
            content=torch.cat([self._embed(noised.labels, noised.valid), content], 1),
            anchors=torch.cat([logits.sigmoid().to(anchors.dtype), anchors], 1),
            attention_mask=noised.attention_mask(num_matching=content.shape[1]),
        )

    def _embed(self, labels: Tensor, valid: Tensor) -> Tensor:
        """labels [B, P], valid [B, P] -> content [B, P, D]"""
        indicator = valid[..., None].to(self.label_embed.weight.dtype)
        content = self.label_embed(labels.where(valid, 0)) * indicator
        return torch.cat([content, indicator], dim=-1) if self.indicator else content


class AnchorQueries(QuerySource):
    """Learned anchors and their content, the same for every image.

    1. An anchor is four learned logits of a box cxcywh.
    2. The content of a matching query is the embedding of the label "unknown" (DN-DETR), a learned
       vector of its own (the deformable models), or zeros (DAB-DETR); the indicator is 0.
    3. With patterns, every anchor occurs once for each learned pattern, which is added to the
       content.

    Args:
        num_queries: number of anchors.
        embed_dim, num_classes, labels, label_std: see `QuerySource`. With `labels` the last channel
            is the indicator.
        num_patterns: patterns an anchor; 0 for none.
        pattern_std: standard deviation of the first patterns (published: 1; in the encoder-only
            model 0.086, by Xavier).
        content: "unknown_label", "learned" or "zeros".
        anchor_init: "normal": logits from N(0, 1), as published; "uniform_centers": centres uniform
            over the image (`random_refpoints_xy` of the published code, which means to freeze them
            but does not); "grid": centres on a grid with width and height 0.3, which suits few
            queries and short training.
    """

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        num_classes: int,
        num_patterns: int = 0,
        pattern_std: float = 1.0,
        content: str = "unknown_label",
        labels: bool = True,
        anchor_init: str = "normal",
        label_std: float = 1.0,
    ):
        super().__init__(embed_dim, num_classes, labels, indicator=labels, label_std=label_std)
        if content not in CONTENTS:
            raise ValueError(f"queries: content must be one of {CONTENTS}, got {content!r}")
        if content == "unknown_label" and not labels:
            raise ValueError('queries: content="unknown_label" needs labels=True')
        self.content_kind = content
        self.anchors = nn.Parameter(initial_anchors(num_queries, anchor_init))
        width = embed_dim - int(self.indicator)
        self.content = (
            nn.Parameter(torch.randn(num_queries, width)) if content == "learned" else None
        )
        self.num_patterns = num_patterns
        self.patterns = (
            nn.Parameter(pattern_std * torch.randn(num_patterns, embed_dim))
            if num_patterns
            else None
        )

    def matching(self, memory: Tokens) -> Queries:
        """Query p * num_queries + q has pattern p."""
        anchors, content = self.anchors.sigmoid(), self._content()
        if self.patterns is not None:
            content = (self.patterns[:, None] + content).flatten(0, 1)
            anchors = anchors.repeat(self.num_patterns, 1)
        batch = len(memory.features)
        return Queries(content.expand(batch, -1, -1), anchors.expand(batch, -1, -1))

    def _content(self) -> Tensor:
        """[num_queries, D] without patterns"""
        number = len(self.anchors)
        if self.content_kind == "learned":
            content = self.content
        elif self.content_kind == "unknown_label":
            content = self.label_embed.weight[-1:].expand(number, -1)
        else:
            content = self.anchors.new_zeros(number, self.embed_dim - int(self.indicator))
        if self.indicator:
            content = torch.cat([content, content.new_zeros(number, 1)], dim=1)
        return content


class ProposalQueries(QuerySource):
    """Anchors are the best of the boxes that the encoder proposes, contents are learned.

    Two stages with mixed query selection (DINO, Zhang et al., ICLR 2023, sec. 3.4):

    1. Every token proposes a box around its centre, 0.05 * 2^level of the image wide and high.
    2. A class and a box head on the projected token judge and correct it.
    3. The tokens with the best score of any class become anchors, without gradient. Contents are
       not theirs: the best anchor gets the first learned vector, and so on.

    Where an image has fewer tokens than there are queries, all of them become anchors.

    Args:
        num_queries: number of anchors.
        embed_dim, num_classes, labels, indicator, label_std: see `QuerySource`. DINO has no
            indicator.
        objectness: the class head tells objects from background only, by one logit (the DINO in
            the DN-DETR repository).
        supervise_all: all tokens are predictions for the criterion, rather than those selected
            (the DINO in the DN-DETR repository).
    """

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        num_classes: int,
        labels: bool = True,
        indicator: bool = False,
        label_std: float = 1.0,
        objectness: bool = False,
        supervise_all: bool = False,
    ):
        super().__init__(embed_dim, num_classes, labels, indicator, label_std)
        self.supervise_all = supervise_all
        self.content = nn.Parameter(torch.empty(num_queries, embed_dim))
        self.projection = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.class_embed = class_head(embed_dim, 1 if objectness else num_classes)
        self.bbox_embed = box_head(embed_dim)
        for matrix in (self.content, self.projection.weight):
            nn.init.xavier_uniform_(matrix)

    def matching(self, memory: Tokens) -> Queries:
        """The queries, with what the encoder predicts as `Queries.proposals`."""
        logits, valid = proposals(memory)
        features = memory.features.masked_fill(~valid[..., None], 0)
        features = self.norm(self.projection(features))
        scores = self.class_embed(features).float()  # [B, S, C or 1]
        chosen = self.select(scores.amax(-1))
        everything = self.supervise_all and self.training
        if not everything:
            # Before the box head: most tokens are not chosen.
            features, logits, scores = (_take(x, chosen) for x in (features, logits, scores))
        boxes = (self.bbox_embed(features) + logits).sigmoid()
        anchors = (_take(boxes, chosen) if everything else boxes).detach()
        content = self.content[: chosen.shape[1]].expand(len(chosen), -1, -1)
        return Queries(content, anchors, proposals=Predictions(scores[None], boxes[None]))

    def select(self, scores: Tensor) -> Tensor:
        """scores [B, S] -> indices [B, K] of the best tokens, best first"""
        return scores.topk(min(len(self.content), scores.shape[1]), dim=1).indices


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """x [B, S, N], indices [B, K] -> [B, K, N]"""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def proposals(memory: Tokens, size: float = 0.05) -> tuple[Tensor, Tensor]:
    """A box around every token (Deformable DETR, Zhu et al., ICLR 2021, appendix A.4).

    Args:
        memory: S tokens of several levels.
        size: width and height in the finest level, as a share of the image; each further level
            doubles it.

    Returns:
        logits [B, S, 4] of boxes cxcywh, float32, and valid [B, S] bool: not padding, and all four
        numbers in 0.01..0.99. The logits of the others are infinite, so that whatever is added the
        box is (1, 1, 1, 1), without gradient.
    """
    centers = memory.centers
    sizes = [
        centers.new_full((number, 2), size * 2**level)
        for level, number in enumerate(memory.level_sizes)
    ]
    boxes = torch.cat([centers, torch.cat(sizes).expand_as(centers)], dim=-1)
    # Nothing on padding: centres are beyond 1 there.
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    return boxes.logit().where(valid[..., None], torch.inf), valid


def initial_anchors(num_queries: int, init: str) -> Tensor:
    """Logits [num_queries, 4] of the first anchors; see `AnchorQueries`."""
    if init == "normal":
        return torch.randn(num_queries, 4)
    if init == "uniform_centers":
        return torch.cat(
            [inverse_sigmoid(torch.rand(num_queries, 2)), torch.randn(num_queries, 2)], 1
        )
    if init == "grid":
        side = -int(-(num_queries**0.5) // 1)
        # Spread over the whole grid, should it have more cells than there are queries.
        cell = torch.linspace(0, side * side - 1, num_queries).long()
        centers = (torch.stack([cell % side, cell // side], 1) + 0.5) / side
        return inverse_sigmoid(torch.cat([centers, torch.full_like(centers, 0.3)], 1))
    raise ValueError(f"queries: anchor_init must be one of {ANCHOR_INITS}, got {init!r}")
