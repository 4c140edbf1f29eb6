"""DAB-DETR's decoder (Liu et al., ICLR 2022, sec. 4), on which DN-DETR is built."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dn_detr.layers import (
    MLP,
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    FeedForward,
    encode_anchors,
)
from dn_detr.modeling.initialization import xavier_uniform
from dn_detr.modeling.structures import Queries, Tokens


class DABDecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward block, a LayerNorm behind each residual."""

    def __init__(
        self, embed_dim: int, num_heads: int, feedforward_dim: int, activation: str, is_first: bool
    ):
        super().__init__()
        self.self_attn = ConditionalSelfAttention(embed_dim, num_heads)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.cross_attn = ConditionalCrossAttention(embed_dim, num_heads, add_position=is_first)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, activation)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        sine: Tensor,
        memory: Tokens,
        allowed: Tensor | None,
    ) -> Tensor:
        """content, position, sine [B, Q, D]; allowed [.., 1, Q, Q] -> [B, Q, D]

        `allowed` is True where a query (row) sees another.
        """
        content = self.norm1(content + self.self_attn(content, position, allowed))
        attended = self.cross_attn(
            content, position, sine, memory.features, memory.position, memory.allowed
        )
        content = self.norm2(content + attended)
        return self.norm3(content + self.ffn(content))


class DABDecoder(nn.Module):
    """Decoder that refines anchors from layer to layer.

    In every layer:

    1. The anchor's sine code becomes the position embedding of the self-attention, by a perceptron.
    2. The code of its centre, scaled by a perceptron of the content (not in the first layer), is
       the position part of the cross-attention's query; its x half is stretched by a width that the
       content asks for over the anchor's width, its y half likewise by height ("width &
       height-modulated attention").
    3. The box head, on the layer's output, moves the anchor; the next layer gets it detached.

    Perceptrons and the final LayerNorm are shared by all layers.

    Args:
        embed_dim: D, a multiple of 4 and of `num_heads`.
        num_heads: attention heads.
        feedforward_dim: hidden width of the feed-forward blocks.
        num_layers: L.
        activation: "prelu" (published), "relu" or "gelu".
        anchor_temperature, anchor_scale: of the anchors' sine code, see `sine_encode` (published:
            10000 and 2 pi).
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
        anchor_temperature: float = 10000,
        anchor_scale: float = 2 * math.pi,
        aligned_positions: float = 0.0,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.anchor_temperature = anchor_temperature
        self.anchor_scale = anchor_scale
        self.layers = nn.ModuleList(
            DABDecoderLayer(embed_dim, num_heads, feedforward_dim, activation, is_first=i == 0)
            for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim)
        # The first layer does not scale, and unused parameters stop DistributedDataParallel.
        self.position_scale = MLP(embed_dim, embed_dim, embed_dim, 2) if num_layers > 1 else None
        self.anchor_position = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        self.size_scale = MLP(embed_dim, embed_dim, 2, 2)
        xavier_uniform(self)
        if aligned_positions:
            for layer in self.layers:
                layer.cross_attn.align_positions(gain=aligned_positions)
            if self.position_scale is not None:
                nn.init.zeros_(self.position_scale.layers[-1].weight)
                nn.init.ones_(self.position_scale.layers[-1].bias)

    def forward(
        self, queries: Queries, memory: Tokens, refine: Callable[[int, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            queries: Q queries.
            memory: S encoded tokens.
            refine: the box head, (layer, states [B, Q, D], anchors [B, Q, 4]) -> moved anchors [B,
                Q, 4].

        Returns:
            states [L, B, Q, D] behind the final norm, and anchors [L, B, Q, 4] that each layer
            started from. The anchors carry gradient: the loss of layer i also trains the refinement
            of layer i - 1.
        """
        content = queries.content
        all_states, all_anchors = [], [queries.anchors]
        # Anchors and their codes may be wider than the weights; autocast leaves all of them wide.
        dtype = self.norm.weight.dtype
        for i, layer in enumerate(self.layers):
            anchors = all_anchors[-1] if i == 0 else all_anchors[-1].detach()
            code = encode_anchors(
                anchors, self.embed_dim // 2, self.anchor_temperature, self.anchor_scale
            )
            sine = self._modulate(code[..., : self.embed_dim], content, anchors, is_first=i == 0)
            position = self.anchor_position(code.to(dtype))
            content = layer(content, position, sine.to(dtype), memory, queries.allowed)
            all_states.append(self.norm(content))
            if i + 1 < len(self.layers):
                all_anchors.append(refine(i, content, anchors))
        return torch.stack(all_states), torch.stack(all_anchors)

    def _modulate(self, code: Tensor, content: Tensor, anchors: Tensor, is_first: bool) -> Tensor:
        """Step 2: code of the centres, the first half for y -> query part of cross-attention.

        Both are [B, Q, D].
        """
        if not is_first:
            code = code * self.position_scale(content)
        # In float32 or wider: the quotient overflows in half precision for tiny anchors.
        size = self.size_scale(content).sigmoid().to(anchors.dtype) / anchors[..., 2:]
        width, height = size.split(1, dim=-1)
        y, x = code.chunk(2, dim=-1)
        return torch.cat([y * height, x * width], dim=-1)
