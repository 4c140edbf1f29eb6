"""DAB-DETR's encoder (Liu et al., ICLR 2022).

Dense self-attention with a position scale that depends on the content.
"""

from dataclasses import replace

from torch import Tensor, nn

from dn_detr.layers import MLP, FeedForward
from dn_detr.modeling.initialization import xavier_uniform
from dn_detr.modeling.structures import Tokens


class DABEncoderLayer(nn.Module):
    """Self-attention and feed-forward block, each with a residual and a LayerNorm behind it."""

    def __init__(self, embed_dim: int, num_heads: int, feedforward_dim: int, activation: str):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, activation)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor, position: Tensor, padding_mask: Tensor | None) -> Tensor:
        """x, position [B, S, D], padding_mask [B, S] -> [B, S, D]"""
        query = x + position
        # Without weights to return it takes scaled_dot_product_attention: 1.6 to 1.9 times faster.
        attended, _ = self.self_attn(
            query, query, x, key_padding_mask=padding_mask, need_weights=False
        )
        x = self.norm1(x + attended)
        return self.norm2(x + self.ffn(x))


class DABEncoder(nn.Module):
    """Stack of `DABEncoderLayer`.

    In every layer the position code is scaled, channel by channel, by a perceptron of the content
    that all layers share. There is no norm behind the last layer.

    Args:
        embed_dim: D.
        num_heads: attention heads.
        feedforward_dim: hidden width of the feed-forward blocks.
        num_layers: number of layers; with 0 the features pass through as they are.
        activation: "prelu" (published), "relu" or "gelu".
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        num_layers: int = 6,
        activation: str = "prelu",
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            DABEncoderLayer(embed_dim, num_heads, feedforward_dim, activation)
            for _ in range(num_layers)
        )
        # Only where it is used: parameters without gradient stop DistributedDataParallel.
        self.position_scale = MLP(embed_dim, embed_dim, embed_dim, 2) if num_layers else None
        xavier_uniform(self)

    def forward(self, tokens: Tokens) -> Tokens:
        """The same tokens with encoded features."""
        x = tokens.features
        for layer in self.layers:
            x = layer(x, tokens.position * self.position_scale(x), tokens.padding_mask)
        return replace(tokens, features=x)
