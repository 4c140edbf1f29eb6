"""What all decoders share: anchors that are refined from layer to layer (DAB-DETR, ICLR 2022)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dn_detr.layers import MLP, FeedForward, checkpointing, encode_anchors
from dn_detr.modeling.structures import Queries, Tokens


class DecoderLayer(nn.Module, ABC):
    """Self-attention, cross-attention and feed-forward block, a LayerNorm behind each residual.

    Args:
        self_attn: (content, position, allowed) -> [B, Q, D].
        cross_attn: the cross-attention, used by `attend`.
        embed_dim: D.
        feedforward_dim: hidden width of the feed-forward block.
        activation: "prelu", "relu" or "gelu".
    """

    def __init__(
        self,
        self_attn: nn.Module,
        cross_attn: nn.Module,
        embed_dim: int,
        feedforward_dim: int,
        activation: str,
    ):
        super().__init__()
        self.self_attn = self_attn
        self.norm1 = nn.LayerNorm(embed_dim)
        self.cross_attn = cross_attn
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, activation)
        self.norm3 = nn.LayerNorm(embed_dim)

    @abstractmethod
    def attend(self, content: Tensor, position: Tensor, *context: Any) -> Tensor:
        """Cross-attention: content, position [B, Q, D] -> [B, Q, D]"""

    def forward(
        self, content: Tensor, position: Tensor, allowed: Tensor | None, *context: Any
    ) -> Tensor:
        """
        Args:
            content, position: [B, Q, D].
            allowed: bool [.., 1, Q, Q], True where a query (row) sees another; None: all see all.
            context: what `attend` needs beside content and position.

        Returns:
            [B, Q, D]
        """
        content = self.norm1(content + self.self_attn(content, position, allowed))
        content = self.norm2(content + self.attend(content, position, *context))
        return self.norm3(content + self.ffn(content))


class AnchorDecoder(nn.Module, ABC):
    """The loop over layers.

    In every layer:

    1. The anchors' sine code becomes the position embedding of the queries, by a perceptron that
       all layers share; `guide` adds what else leads the layer.
    2. The layer updates the content.
    3. The box head, on the layer's output, moves the anchors; the next layer gets them detached.

    Subclasses make `layers` and say how they are led.

    Args:
        embed_dim: D, a multiple of 4.
        anchor_temperature, anchor_scale: of the anchors' sine code, see `sine_encode` (published:
            10000 and 2 pi).
        final_norm: a LayerNorm, one for all layers, in front of the class and box heads; refinement
            is in front of it.
        look_forward_twice: the anchors that the heads start from carry the gradient of one
            refinement, so that the loss of layer i also trains the refinement of layer i - 1 (DAB-
            DETR's published code; named and studied in DINO, Zhang et al., ICLR 2023, sec. 3.5).
        activation_checkpointing: less memory for more time, see `layers.checkpointing`.
    """

    layers: nn.ModuleList

    def __init__(
        self,
        embed_dim: int,
        final_norm: bool,
        look_forward_twice: bool,
        anchor_temperature: float = 10000,
        anchor_scale: float = 2 * math.pi,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.anchor_temperature = anchor_temperature
        self.anchor_scale = anchor_scale
        self.look_forward_twice = look_forward_twice
        self.activation_checkpointing = activation_checkpointing
        self.norm = nn.LayerNorm(embed_dim) if final_norm else nn.Identity()
        self.anchor_position = MLP(2 * embed_dim, embed_dim, embed_dim, 2)

    def encode(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Step 1: anchors [B, Q, 4] -> their sine code [B, Q, 2 D] and position [B, Q, D].

        Anchors and codes may be wider than the weights; autocast leaves all of them wide.
        """
        code = encode_anchors(
            anchors, self.embed_dim // 2, self.anchor_temperature, self.anchor_scale
        )
        return code, self.anchor_position(code.to(self.anchor_position.layers[0].weight.dtype))

    @abstractmethod
    def prepare(self, memory: Tokens) -> Any:
        """What `guide` needs of the memory, made once for all layers."""

    @abstractmethod
    def guide(self, index: int, content: Tensor, anchors: Tensor, prepared: Any) -> tuple:
        """Position [B, Q, D] and context of layer `index`; anchors [B, Q, 4]."""

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
            states [L, B, Q, D] for the heads, and anchors [L, B, Q, 4] that each layer started
            from.
        """
        content, anchors = queries.content, queries.anchors
        prepared = self.prepare(memory)
        all_states, all_anchors = [], [anchors]
        for index, layer in enumerate(self.layers):
            position, *context = self.guide(index, content, anchors, prepared)
            content = checkpointing.run(
                layer,
                content,
                position,
                queries.allowed,
                *context,
                checkpointed=self.activation_checkpointing,
            )
            all_states.append(self.norm(content))
            if index + 1 < len(self.layers):
                with torch.set_grad_enabled(torch.is_grad_enabled() and self.look_forward_twice):
                    all_anchors.append(refine(index, content, anchors))
                anchors = all_anchors[-1].detach()
        return torch.stack(all_states), torch.stack(all_anchors)
