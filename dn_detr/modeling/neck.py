"""Necks: feature maps of a backbone -> tokens of a transformer."""

from collections.abc import Mapping

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
    """

    def __init__(
        self, in_feature: str, in_channels: int, embed_dim: int, position_encoding: nn.Module
    ):
        super().__init__()
        self.in_feature = in_feature
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
        shape = tuple(feature.shape[-2:])
        # Nearest, as published; a cell counts as image where its first pixel does.
        mask = interpolate(padding_mask[:, None].float(), size=shape)[:, 0] > 0.5
        position = self.position_encoding(mask).flatten(1, 2)
        return Tokens(
            features=feature.flatten(2).transpose(1, 2),
            # As the weights, not as the feature: autocast must not make it narrower.
            position=position.to(self.projection.weight.dtype),
            padding_mask=mask.flatten(1) if padded else None,
            shapes=(shape,),
        )
