"""Dense attention of decoders: DETR's, and with content and position apart (Conditional DETR, DAB).

Shape letters: B batch, Q queries, S memory tokens, D channels, H heads, L feature levels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, D] -> [B, H, N, D / H]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, D / H] -> [B, N, D]"""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention with queries and keys of content plus position (DETR, Carion et al. 2020).

    What `nn.MultiheadAttention` computes; but that one copies a mask, as numbers, for every head.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        # One matrix for all three, as published: Xavier's range depends on the shape.
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.output = nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, content: Tensor, position: Tensor, allowed: Tensor | None = None) -> Tensor:
        """
        Args:
            content, position: [B, Q, D].
            allowed: bool, broadcastable to [B, H, Q, Q], True where a query (row) may see a key.

        Returns:
            [B, Q, D]
        """
        sizes = [2 * content.shape[-1], content.shape[-1]]
        weights, biases = self.in_proj.weight.split(sizes), self.in_proj.bias.split(sizes)
        query, key = linear(content + position, weights[0], biases[0]).chunk(2, dim=-1)
        value = linear(content, weights[1], biases[1])
        query, key, value = (split_heads(x, self.num_heads) for x in (query, key, value))
        return self.output(merge_heads(scaled_dot_product_attention(query, key, value, allowed)))


class ConditionalSelfAttention(nn.Module):
    """Self-attention whose queries and keys are sums of a content and a position projection.

    Values come from the content alone. There is no joint input projection.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_content = nn.Linear(embed_dim, embed_dim)
        self.query_position = nn.Linear(embed_dim, embed_dim)
        self.key_content = nn.Linear(embed_dim, embed_dim)
        self.key_position = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.output = nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.output.bias)

    def query(self, content: Tensor, position: Tensor) -> Tensor:
        """The projected queries of all heads: content, position [B, Q, D] -> [B, Q, D]"""
        return self.query_content(content) + self.query_position(position)

    def forward(self, content: Tensor, position: Tensor, allowed: Tensor | None = None) -> Tensor:
        """
        Args:
            content, position: [B, Q, D].
            allowed: bool, broadcastable to [B, H, Q, Q], True where a query (row) may see a key.

        Returns:
            [B, Q, D]
        """
        query = self.query(content, position)
        key = self.key_content(content) + self.key_position(position)
        query, key, value = (
            split_heads(x, self.num_heads) for x in (query, key, self.value(content))
        )
        return self.output(merge_heads(scaled_dot_product_attention(query, key, value, allowed)))


class ConditionalCrossAttention(nn.Module):
    """Cross-attention that concatenates content and position in every head.

    So the attention weight is the sum of a content and a position similarity (Conditional DETR,
    Meng et al., ICCV 2021): heads are 2 D / H wide in queries and keys, D / H in values.

    Args:
        embed_dim: D.
        num_heads: H.
        add_position: also add the positions to the contents, as the first decoder layer does.
    """

    def __init__(self, embed_dim: int, num_heads: int, add_position: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.query_content = nn.Linear(embed_dim, embed_dim)
        self.query_position = nn.Linear(embed_dim, embed_dim) if add_position else None
        self.query_sine = nn.Linear(embed_dim, embed_dim)
        self.key_content = nn.Linear(embed_dim, embed_dim)
        self.key_position = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.output = nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.output.bias)

    def align_positions(self, gain: float = 1.0) -> None:
        """Start the projections of query and key positions equal; a head has every H-th frequency.

        Then position similarity is a bump around the anchor from the first step on, which a short
        training cannot learn from random projections. Needs position codes of one temperature and
        scale on both sides.

        Args:
            gain: factor of either projection; the greater, the narrower the bump.
        """
        dim = self.query_sine.in_features
        # Input channels as (coordinate, frequency, sine or cosine), output channels grouped
        # by head.
        channels = torch.arange(dim).view(2, dim // 4, 2)
        order = [channels[:, head :: self.num_heads].flatten() for head in range(self.num_heads)]
        permutation = torch.eye(dim)[torch.cat(order)]
        for projection in (self.query_sine, self.key_position):
            with torch.no_grad():
                projection.weight.copy_(gain * permutation)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        sine: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        allowed: Tensor | None = None,
        level_sizes: Sequence[int] = (),
        level_weights: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            content, position, sine: [B, Q, D]; contents of the queries, their position embedding,
                and the (scaled) sine code of their centres.
            memory, memory_position: [B, S, D].
            allowed: bool, broadcastable to [B, H, Q, S], True where a query may see a token.
            level_sizes: tokens of each level, S in all; with `level_weights` only.
            level_weights: [B, Q, L], summing to 1 over levels. With them each level has a softmax
                of its own, and the output is their weighted sum (DN-DETR's encoder-only model).

        Returns:
            [B, Q, D]
        """
        key_position = self.key_position(memory_position)
        query, key = self.query_content(content), self.key_content(memory)
        if self.query_position is not None:
            query, key = query + self.query_position(position), key + key_position
        query = self._concatenate(query, self.query_sine(sine))
        key = self._concatenate(key, key_position)
        value = split_heads(self.value(memory), self.num_heads)
        if level_weights is None:
            attended = scaled_dot_product_attention(query, key, value, allowed)
        else:
            attended = _attend_by_level(query, key, value, allowed, level_sizes, level_weights)
        return self.output(merge_heads(attended))

    def _concatenate(self, content: Tensor, position: Tensor) -> Tensor:
        """Two [B, N, D] -> [B, H, N, 2 D / H]"""
        return torch.cat([split_heads(x, self.num_heads) for x in (content, position)], dim=-1)


def _attend_by_level(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    level_sizes: Sequence[int],
    level_weights: Tensor,
) -> Tensor:
    """Attention to each level apart, summed by [B, Q, L] weights.

    query [B, H, Q, .], key, value [B, H, S, .] -> [B, H, Q, .]
    """
    keys, values = (x.split(list(level_sizes), dim=2) for x in (key, value))
    masks = [None] * len(keys) if allowed is None else allowed.split(list(level_sizes), dim=-1)
    weights = level_weights[:, None, :, :, None].unbind(3)  # L times [B, 1, Q, 1]
    return sum(
        weight * scaled_dot_product_attention(query, *level)
        for weight, *level in zip(weights, keys, values, masks, strict=True)
    )
