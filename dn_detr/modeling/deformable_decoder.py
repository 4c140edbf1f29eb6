"""Decoder with deformable cross-attention to all levels.

DAB-Deformable-DETR, DN-Deformable-DETR (https://github.com/IDEA-Research/DN-DETR) and DINO (Zhang
et al., ICLR 2023).
"""

import math

from torch import Tensor, nn

from dn_detr.layers import MLP, MultiScaleDeformableAttention, SelfAttention, project_values
from dn_detr.modeling.decoder import AnchorDecoder, DecoderLayer
from dn_detr.modeling.initialization import xavier_uniform
from dn_detr.modeling.structures import Tokens


class DeformableDecoderLayer(DecoderLayer):
    """Plain self-attention, and cross-attention to a few points around the anchor."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int,
        activation: str,
        num_levels: int,
        num_points: int,
    ):
        super().__init__(
            SelfAttention(embed_dim, num_heads),
            MultiScaleDeformableAttention(embed_dim, num_heads, num_levels, num_points),
            embed_dim,
            feedforward_dim,
            activation,
        )

    def attend(
        self,
        content: Tensor,
        position: Tensor,
        value: Tensor,
        memory: Tokens,
        reference_boxes: Tensor,
    ) -> Tensor:
        # The mask belongs to tokens: projected values have been masked already.
        padding_mask = memory.padding_mask if value.dim() == 3 else None
        query = content + position
        return self.cross_attn(query, value, memory.shapes, reference_boxes, padding_mask)


class DeformableDecoder(AnchorDecoder):
    """Decoder whose queries look at a few points around their anchors, in every level.

    Offsets are relative to the anchor's size. Anchors are measured in the image, not in its
    padding; positions code them as they lie in the finest level, with its padding, as published.

    Args:
        embed_dim: D, a multiple of 4 and of `num_heads`.
        num_heads: attention heads.
        feedforward_dim: hidden width of the feed-forward blocks.
        num_layers: L.
        num_levels: feature levels.
        num_points: sampling points of a head in each level.
        activation: "relu" (published), "prelu" or "gelu".
        position_scale: scale positions, but for the first layer's, by a perceptron of the content
            that all layers share (DAB- and DN-Deformable-DETR; DINO does not).
        final_norm, look_forward_twice: see `AnchorDecoder` (DINO has both; DAB- and
            DN-Deformable-DETR neither).
        anchor_temperature, anchor_scale, activation_checkpointing: see `AnchorDecoder`.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        num_layers: int = 6,
        num_levels: int = 4,
        num_points: int = 4,
        activation: str = "relu",
        position_scale: bool = True,
        final_norm: bool = False,
        look_forward_twice: bool = False,
        anchor_temperature: float = 10000,
        anchor_scale: float = 2 * math.pi,
        activation_checkpointing: bool = False,
    ):
        super().__init__(
            embed_dim,
            final_norm,
            look_forward_twice,
            anchor_temperature,
            anchor_scale,
            activation_checkpointing,
        )
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(
                embed_dim, num_heads, feedforward_dim, activation, num_levels, num_points
            )
            for _ in range(num_layers)
        )
        # The first layer does not scale, and unused parameters stop DistributedDataParallel.
        scaled = position_scale and num_layers > 1
        self.position_scale = MLP(embed_dim, embed_dim, embed_dim, 2) if scaled else None
        xavier_uniform(self)
        for layer in self.layers:
            layer.cross_attn.reset_parameters()

    def prepare(self, memory: Tokens) -> tuple[Tokens, list[Tensor], Tensor | None]:
        """The memory, its value for every layer, and its valid ratios [B, 1, levels, 4]."""
        attentions = [layer.cross_attn for layer in self.layers]
        if self.activation_checkpointing:
            # One product for all layers would keep the values of all of them.
            values = [memory.features] * len(attentions)
        else:
            values = project_values(memory.features, attentions, memory.padding_mask)
        ratios = memory.valid_ratios
        return memory, values, None if ratios is None else ratios.repeat(1, 1, 2)[:, None]

    def guide(self, index: int, content: Tensor, anchors: Tensor, prepared: tuple) -> tuple:
        """Position [B, Q, D], value, memory, and reference boxes [B, Q, levels or 1, 4]."""
        memory, values, ratios = prepared
        boxes = anchors[:, :, None] if ratios is None else anchors[:, :, None] * ratios
        _, position = self.encode(boxes[:, :, 0])
        if self.position_scale is not None and index > 0:
            position = position * self.position_scale(content)
        return position, values[index], memory, boxes
