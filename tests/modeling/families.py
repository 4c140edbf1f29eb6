"""A small transformer of every family, from feature maps to predictions, and inputs for them."""

import torch

from dn_detr.denoising import DenoisingGenerator
from dn_detr.layers import SinePositionEncoding, Targets
from dn_detr.modeling import (
    AnchorQueries,
    DABDecoder,
    DABEncoder,
    DeformableDecoder,
    DeformableEncoder,
    DetectionHeads,
    MultiLevelNeck,
    ProposalQueries,
    SingleLevelNeck,
    Tokens,
)

D, C, QUERIES, LEVELS = 16, 5, 6, 3
SMALL = dict(num_heads=4, feedforward_dim=32)
DEFORMABLE = dict(SMALL, num_levels=LEVELS, num_points=2)


def multi_level_neck():
    return MultiLevelNeck(
        dict(res4=5, res5=7), D, LEVELS, SinePositionEncoding(D, 10000, offset=-0.5), norm_groups=4
    )


def dab(**switches):
    """DN-DETR"""
    return (
        SingleLevelNeck("res5", 7, D, SinePositionEncoding(D)),
        DABEncoder(D, **SMALL, num_layers=2, **switches),
        AnchorQueries(QUERIES, D, C),
        DABDecoder(D, **SMALL, num_layers=3, **switches),
        DetectionHeads(D, C),
    )


def levels(**switches):
    """DN-Deformable-DETR, encoder only"""
    return (
        multi_level_neck(),
        DeformableEncoder(D, **DEFORMABLE, num_layers=2, **switches),
        AnchorQueries(QUERIES // 2, D, C, num_patterns=2),
        DABDecoder(D, **SMALL, num_layers=3, num_levels=LEVELS, **switches),
        DetectionHeads(D, C),
    )


def deformable(**switches):
    """DN-Deformable-DETR, v2"""
    return (
        multi_level_neck(),
        DeformableEncoder(D, **DEFORMABLE, num_layers=2, **switches),
        AnchorQueries(QUERIES, D, C, content="learned"),
        DeformableDecoder(D, **DEFORMABLE, num_layers=3, **switches),
        DetectionHeads(D, C, num_layers=3, size_bias=-2.0),
    )


def dino(**switches):
    """DINO"""
    neck, encoder, _, _, _ = deformable(**switches)
    style = dict(position_scale=False, final_norm=True, look_forward_twice=True)
    return (
        neck,
        encoder,
        ProposalQueries(QUERIES, D, C),
        DeformableDecoder(D, **DEFORMABLE, num_layers=3, **style, **switches),
        DetectionHeads(D, C),
    )


def objectness(**switches):
    """The DINO in the DN-DETR repository"""
    neck, encoder, _, _, heads = deformable()
    source = ProposalQueries(QUERIES, D, C, indicator=True, objectness=True, supervise_all=True)
    decoder = DeformableDecoder(D, **DEFORMABLE, num_layers=3, look_forward_twice=True, **switches)
    return neck, encoder, source, decoder, heads


FAMILIES = {make.__name__: make for make in (dab, levels, deformable, dino, objectness)}


class Transformer(torch.nn.Module):
    """Everything between the features and the predictions."""

    def __init__(self, family="dab", **switches):
        super().__init__()
        torch.manual_seed(0)
        self.neck, self.encoder, self.queries, self.decoder, self.heads = FAMILIES[family](
            **switches
        )
        # Published initialisation gives equal boxes in all layers and equal attention weights,
        # which would hide errors.
        for name, parameter in self.named_parameters():
            if any(part in name for part in ("heads", "offsets.weight", "attn.weights.weight")):
                torch.nn.init.normal_(parameter, std=0.3)

    def tokens(self, features, mask):
        return self.encoder(self.neck(features, mask, padded=bool(mask.any())))

    def predict(self, tokens, noised=None):
        queries = self.queries(tokens, noised)
        return self.heads(*self.decoder(queries, tokens, self.heads.refine))

    def forward(self, features, mask, noised=None):
        return self.predict(self.tokens(features, mask), noised)


def make_inputs(batch=2, height=6, width=8):
    """Feature maps of strides 8 and 16, and the mask of images without padding."""
    g = torch.Generator().manual_seed(1)
    features = {
        "res4": torch.randn(batch, 5, 2 * height, 2 * width, generator=g),
        "res5": torch.randn(batch, 7, height, width, generator=g),
    }
    return features, torch.zeros(batch, height * 16, width * 16, dtype=torch.bool)


def make_tokens(shapes=((4, 6), (2, 3)), valid=None):
    """Random tokens of two images; `valid`: size of the second one in the finest level."""
    g = torch.Generator().manual_seed(2)
    size = sum(h * w for h, w in shapes)
    features, position = torch.randn(2, 2, size, D, generator=g)
    mask = None
    if valid is not None:
        masks = []
        for level, (h, w) in enumerate(shapes):
            inside = torch.zeros(2, h, w, dtype=torch.bool)
            height, width = (-(-side >> level) for side in valid)  # rounded up
            inside[1, height:] = True
            inside[1, :, width:] = True
            masks.append(inside.flatten(1))
        mask = torch.cat(masks, dim=1)
    return Tokens(features, position, mask, shapes)


def make_noised(counts=(2, 3), seed=0, **kwargs):
    torch.manual_seed(seed)
    labels = [torch.randint(0, C, (n,)) for n in counts]
    return DenoisingGenerator(C, groups=2, **kwargs)(
        Targets.pad(labels, [torch.rand(n, 4) * 0.5 + 0.2 for n in counts])
    )
