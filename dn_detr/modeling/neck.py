"""Necks: feature maps of a backbone -> tokens of a transformer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dn_detr.modeling.structures import Tokens


class SingleLevelNeck(nn.Module):
    """One feature map, projected by a 1x1 convolution (DETR, DAB-DETR, DN-DETR).

    Args:
        in_feature: name of the feature map.
        in_channels: its channels.
        embed_dim: D.
        position_encoding: module, padding mask [B, h, w] -> code [B, h, w, D].
        exact_mask: see `cell_mask`.
    """

    def __init__(
        self,
        in_feature: str,
        in_channels: int,
        embed_dim: int,
        position_encoding: nn.Module,
        exact_mask: bool = True,
    ):
        super().__init__()
        self.in_feature = in_feature
        self.exact_mask = exact_mask
        self.projection = nn.Conv2d(in_channels, embed_dim, kernel_size=1)
        self.position_encoding = position_encoding

    def forward(self, features: Mapping[str, Tensor], padding_mask: Tensor, padded: bool) -> Tokens:
        """
        Args:
            features: feature maps [B, C, h, w] by name.
            padding_mask: [B, H, W] bool of the images, True on padding.
            padded: whether any image is padded, as the host knows.
        """
        feature = self.projection(features[self.in_feature])
        tokens = flatten_levels(
            [feature], padding_mask, padded, self.position_encoding, self.exact_mask
        )
        # As the weights, not as the feature: autocast must not make it narrower.
        return replace(tokens, position=tokens.position.to(self.projection.weight.dtype))


class MultiLevelNeck(nn.Module):
    """Several feature maps, each projected with a group norm, and coarser ones made of the last.

    Deformable DETR (Zhu et al., ICLR 2021, appendix A.4): a 1x1 convolution for every feature map,
    then 3x3 convolutions of stride 2, the first one of the last feature map as it comes from the
    backbone. A learned vector for each level is added to its position codes.

    Args:
        in_features: channels of every feature map to take, by its name, finest first.
        embed_dim: D, a multiple of `norm_groups`.
        num_levels: number of levels in all, at least as many as feature maps.
        position_encoding: module, padding mask [B, h, w] -> code [B, h, w, D].
        norm_groups: groups of the norms.
        xavier: start the convolutions by Xavier, with zero biases (published, but for the
            encoder-only model, which has PyTorch's own start).
        level_embed: False leaves the learned vectors out: without an encoder layer, nothing reads
            position codes in front of a deformable decoder.
        exact_mask: see `cell_mask`.

    Raises:
        ValueError: fewer levels than feature maps; channels that the norms do not divide.
    """

    def __init__(
        self,
        in_features: Mapping[str, int],
        embed_dim: int,
        num_levels: int,
        position_encoding: nn.Module,
        norm_groups: int = 32,
        xavier: bool = True,
        level_embed: bool = True,
        exact_mask: bool = True,
    ):
        super().__init__()
        if not 1 <= len(in_features) <= num_levels:
            raise ValueError(
                f"neck: num_levels must be at least the number of in_features, {len(in_features)}, "
                f"and that at least 1; got num_levels={num_levels}"
            )
        if embed_dim % norm_groups:
            raise ValueError(
                f"neck: embed_dim must be a multiple of norm_groups, {norm_groups}; got "
                f"embed_dim={embed_dim}"
            )
        self.in_features = tuple(in_features)
        self.exact_mask = exact_mask
        convolutions = [nn.Conv2d(channels, embed_dim, 1) for channels in in_features.values()]
        channels = list(in_features.values())[-1]
        for _ in range(num_levels - len(in_features)):
            convolutions.append(nn.Conv2d(channels, embed_dim, 3, stride=2, padding=1))
            channels = embed_dim
        if xavier:
            for convolution in convolutions:
                nn.init.xavier_uniform_(convolution.weight)
                nn.init.zeros_(convolution.bias)
        self.projections = nn.ModuleList(
            nn.Sequential(convolution, nn.GroupNorm(norm_groups, embed_dim))
            for convolution in convolutions
        )
        self.level_embed = None
        if level_embed:
            self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))
        self.position_encoding = position_encoding

    def forward(self, features: Mapping[str, Tensor], padding_mask: Tensor, padded: bool) -> Tokens:
        """As `SingleLevelNeck`; the levels stand one after the other, the finest first."""
        sources = [features[name] for name in (*self.in_features, self.in_features[-1])]
        levels = []
        for index, projection in enumerate(self.projections):
            levels.append(projection(sources[index] if index < len(sources) else levels[-1]))
        tokens = flatten_levels(
            levels, padding_mask, padded, self.position_encoding, self.exact_mask
        )
        dtype = self.projections[0][0].weight.dtype
        if self.level_embed is None:
            return replace(tokens, position=tokens.position.to(dtype))
        codes = tokens.position.to(dtype).split(tokens.level_sizes, dim=1)
        codes = [code + embed for code, embed in zip(codes, self.level_embed, strict=True)]
        return replace(tokens, position=torch.cat(codes, dim=1))


def flatten_levels(
    levels: Sequence[Tensor],
    padding_mask: Tensor,
    padded: bool,
    position_encoding: nn.Module,
    exact_mask: bool,
) -> Tokens:
    """Feature maps [B, D, h, w] as one sequence of tokens; see the necks for the other arguments.

    The position codes are in float32.
    """
    shapes = tuple(tuple(level.shape[-2:]) for level in levels)
    masks = [cell_mask(padding_mask, shape, exact_mask) for shape in shapes]
    return Tokens(
        features=torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1),
        position=torch.cat([position_encoding(mask).flatten(1, 2) for mask in masks], dim=1),
        padding_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1) if padded else None,
        shapes=shapes,
    )


def cell_mask(padding_mask: Tensor, shape: tuple[int, int], exact: bool) -> Tensor:
    """Which cells of a feature map are padding: those whose first pixel is.

    Published code takes that pixel by nearest interpolation, which spreads the cells evenly over
    the padded image. Where its side is no multiple of the stride, cells are larger than that, and
    an image that is padded gets up to one cell more, and its coordinates another scale, than
    alone. With strides of powers of two the exact place is known.

    Args:
        padding_mask: [B, H, W] bool of the images.
        shape: (h, w) of the feature map.
        exact: False for the published way.

    Returns:
        [B, h, w] bool
    """
    strides = [
        2 ** math.ceil(math.log2(side / cells))
        for side, cells in zip(padding_mask.shape[1:], shape)
    ]
    mask = padding_mask[:, :: strides[0], :: strides[1]]
    if exact and tuple(mask.shape[1:]) == tuple(shape):
        return mask
    return interpolate(padding_mask[:, None].float(), size=shape)[:, 0] > 0.5
