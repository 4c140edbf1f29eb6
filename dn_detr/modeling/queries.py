"""Query source: learned 4-D anchors with content (DAB-DETR).

With denoising (DN-DETR), the noised queries go in front.
"""

import torch
from torch import Tensor, nn

from dn_detr.denoising import NoisedTargets
from dn_detr.layers import inverse_sigmoid
from dn_detr.modeling.structures import Queries

CONTENTS = ("unknown_label", "zeros")
ANCHOR_INITS = ("normal", "uniform_centers", "grid")


class AnchorQueries(nn.Module):
    """Learned anchors and their content; noised ground truth goes in front.

    1. An anchor is four learned logits of a box cxcywh.
    2. The content of a matching query is the embedding of the label "unknown" with indicator 0
       (DN-DETR), or zeros (DAB-DETR). With patterns, every anchor occurs once for each learned
       pattern, which is added to the content.
    3. The content of a denoising query is the embedding of its noised label with indicator 1; its
       anchor is its noised box. The indicator is the last channel.

    Args:
        num_queries: number of anchors.
        embed_dim: D.
        num_classes: C; the label embedding has C + 1 rows, the last one is "unknown".
        num_patterns: patterns an anchor; 0 for none.
        content: "unknown_label" or "zeros". With "zeros" there is no label embedding, hence no
            denoising.
        anchor_init: "normal": logits from N(0, 1), as published; "uniform_centers": centres uniform
            over the image (`random_refpoints_xy` of the published code, which means to freeze them
            but does not); "grid": centres on a grid with width and height 0.3, which suits few
            queries and short training.
        label_std: standard deviation of the first label embeddings; 1 as published. The smaller,
            the more of the first layers' output is what attention found.
    """

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        num_classes: int,
        num_patterns: int = 0,
        content: str = "unknown_label",
        anchor_init: str = "normal",
        label_std: float = 1.0,
    ):
        super().__init__()
        if content not in CONTENTS:
            raise ValueError(f"queries: content must be one of {CONTENTS}, got {content!r}")
        self.embed_dim = embed_dim
        self.num_patterns = num_patterns
        self.anchors = nn.Parameter(initial_anchors(num_queries, anchor_init))
        self.patterns = nn.Parameter(torch.randn(num_patterns, embed_dim)) if num_patterns else None
        self.label_embed = (
            nn.Embedding(num_classes + 1, embed_dim - 1) if content == "unknown_label" else None
        )
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=label_std)

    def forward(self, batch_size: int, noised: NoisedTargets | None = None) -> Queries:
        """Queries of a batch: ``[denoising slots | matching queries]``.

        Raises:
            ValueError: noised targets for queries without a label embedding.
        """
        content, anchors = self._matching()
        content, anchors = content.expand(batch_size, -1, -1), anchors.expand(batch_size, -1, -1)
        if noised is None:
            return Queries(content, anchors)
        if self.label_embed is None:
            raise ValueError(
                "denoising needs a label embedding: set model.queries.content=unknown_label "
                "(or model.denoising=null)"
            )
        mask = noised.attention_mask(num_matching=content.shape[1])
        dn_content, dn_anchors = self._denoising(noised)
        return Queries(
            torch.cat([dn_content, content], 1), torch.cat([dn_anchors, anchors], 1), mask
        )

    def _matching(self) -> tuple[Tensor, Tensor]:
        """content [Q, D] and anchors [Q, 4] of the matching part

        Query p * num_queries + q has pattern p.
        """
        anchors = self.anchors.sigmoid()
        if self.label_embed is None:
            content = self.anchors.new_zeros(len(anchors), self.embed_dim)
        else:
            unknown = self.label_embed.weight[-1:]
            content = torch.cat([unknown, unknown.new_zeros(1, 1)], 1).expand(len(anchors), -1)
        if self.patterns is not None:
            content = (self.patterns[:, None] + content).flatten(0, 1)
            anchors = anchors.repeat(self.num_patterns, 1)
        return content, anchors

    def _denoising(self, noised: NoisedTargets) -> tuple[Tensor, Tensor]:
        """content [B, P, D] and anchors [B, P, 4] of the denoising part

        A slot without a target has zero content and zero logits.
        """
        valid = noised.valid[..., None]
        labels = noised.labels.where(noised.valid, 0)
        indicator = valid.to(self.anchors.dtype)
        content = torch.cat([self.label_embed(labels) * indicator, indicator], dim=-1)
        logits = inverse_sigmoid(noised.boxes).where(valid, 0)
        return content, logits.sigmoid().to(self.anchors.dtype)


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
