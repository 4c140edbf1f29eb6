"""DAB-DETR's decoder (Liu et al., ICLR 2022, sec. 4), on which DN-DETR is built."""

import math

import torch
from torch import Tensor, nn

from dn_detr.layers import (
    MLP,
    ConditionalCrossAttention,
    ConditionalSelfAttention,
)
from dn_detr.modeling.decoder import AnchorDecoder, DecoderLayer
from dn_detr.modeling.initialization import xavier_uniform
from dn_detr.modeling.structures import Tokens


class DABDecoderLayer(DecoderLayer):
    """Dense attention with content and position apart; see `DABDecoder`."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int,
        activation: str,
        is_first: bool,
        num_levels: int | None = None,
    ):
        super().__init__(
            ConditionalSelfAttention(embed_dim, num_heads),
            ConditionalCrossAttention(embed_dim, num_heads, add_position=is_first),
            embed_dim,
            feedforward_dim,
            activation,
        )
        self.level_weights = nn.Linear(embed_dim, num_levels) if num_levels else None

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        allowed: Tensor | None,
        sine: Tensor,
        memory: Tokens,
    ) -> Tensor:
        """content, position, sine [B, Q, D]; allowed [.., 1, Q, Q] -> [B, Q, D]"""
        weights = None
        if self.level_weights is not None:
            # Read off the query of the self-attention, in front of it, as published.
            query = self.self_attn.query(content, position)
            weights = self.level_weights(query).softmax(-1)
        return super().forward(content, position, allowed, sine, memory, weights)

    def attend(
        self,
        content: Tensor,
        position: Tensor,
        sine: Tensor,
        memory: Tokens,
        level_weights: Tensor | None,
    ) -> Tensor:
        return self.cross_attn(
            content,
            position,
            sine,
            memory.features,
            memory.position,
            memory.allowed,
            memory.level_sizes,
            level_weights,
        )


class DABDecoder(AnchorDecoder):
    """Decoder with dense cross-attention that is led by anchors.

    The sine code of an anchor's centre, scaled by a perceptron of the content (not in the first
    layer), is the position part of the cross-attention's query; its x half is stretched by a width
    that the content asks for over the anchor's width, its y half likewise by height ("width &
    height-modulated attention"). Perceptrons are shared by all layers.

    With `num_levels` every query weighs the levels, in each of which attention is apart: the
    decoder of DN-DETR's encoder-only deformable model.

    Args:
        embed_dim: D, a multiple of 4 and of `num_heads`.
        num_heads: attention heads.
        feedforward_dim: hidden width of the feed-forward blocks.
        num_layers: L.
        activation: "prelu" (published), "relu" or "gelu".
        num_levels: feature levels that are attended to apart; None: all tokens together.
        anchor_temperature, anchor_scale, activation_checkpointing: see `AnchorDecoder`.
        aligned_positions: start with cross-attention that looks at the anchor, by this gain (see
            `ConditionalCrossAttention.align_positions`), and with position scales of 1. For short
            training; 0 is the published start, Xavier.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        num_layers: int = 6,
        activation: str = "prelu",
        num_levels: int | None = None,
        anchor_temperature: float = 10000,
        anchor_scale: float = 2 * math.pi,
        aligned_positions: float = 0.0,
        activation_checkpointing: bool = False,
    ):
        super().__init__(
            embed_dim,
            final_norm=True,
            look_forward_twice=True,
            anchor_temperature=anchor_temperature,
            anchor_scale=anchor_scale,
            activation_checkpointing=activation_checkpointing,
        )
        layer = (embed_dim, num_heads, feedforward_dim, activation)
        self.layers = nn.ModuleList(
            DABDecoderLayer(*layer, is_first=i == 0, num_levels=num_levels)
            for i in range(num_layers)
        )
        # The first layer does not scale, and unused parameters stop DistributedDataParallel.
        self.position_scale = MLP(embed_dim, embed_dim, embed_dim, 2) if num_layers > 1 else None
        self.size_scale = MLP(embed_dim, embed_dim, 2, 2)
        xavier_uniform(self)
        if aligned_positions:
            for layer in self.layers:
                layer.cross_attn.align_positions(gain=aligned_positions)
            if self.position_scale is not None:
                nn.init.zeros_(self.position_scale.layers[-1].weight)
                nn.init.ones_(self.position_scale.layers[-1].bias)

    def prepare(self, memory: Tokens) -> Tokens:
        return memory

    def guide(self, index: int, content: Tensor, anchors: Tensor, prepared: Tokens) -> tuple:
        """Position and sine [B, Q, D], and the memory."""
        code, position = self.encode(anchors)
        sine = self._modulate(code[..., : self.embed_dim], content, anchors, is_first=index == 0)
        return position, sine.to(position.dtype), prepared

    def _modulate(self, code: Tensor, content: Tensor, anchors: Tensor, is_first: bool) -> Tensor:
        """Code of the centres, the first half for y -> position part of cross-attention's query.

        Both are [B, Q, D].
        """
        if not is_first:
            code = code * self.position_scale(content)
        # In float32 or wider: the quotient overflows in half precision for tiny anchors.
        size = self.size_scale(content).sigmoid().to(anchors.dtype) / anchors[..., 2:]
        width, height = size.split(1, dim=-1)
        y, x = code.chunk(2, dim=-1)
        return torch.cat([y * height, x * width], dim=-1)
