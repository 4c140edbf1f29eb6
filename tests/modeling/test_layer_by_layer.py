"""Deformable encoder and decoder beside their formulas, written out layer by layer."""

import pytest
import torch

from dn_detr.layers import encode_anchors
from dn_detr.modeling import DABDecoder, DeformableDecoder
from tests.modeling.families import (
    DEFORMABLE,
    LEVELS,
    QUERIES,
    SMALL,
    D,
    Transformer,
    make_noised,
    make_tokens,
)

SHAPES = ((8, 12), (4, 6), (2, 3))
VALID = ((8, 12), (4, 8)), ((4, 6), (2, 4)), ((2, 3), (1, 2))  # of both images, level by level


def make(family, padded):
    """A model without dropout whose norms do something, and tokens."""
    model = Transformer(family).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model, make_tokens(SHAPES, (4, 8) if padded else None)


def valid_sizes(padded):
    """(height, width) of what is image, [level][image]"""
    return VALID if padded else [(shape, shape) for shape in SHAPES]


@pytest.mark.parametrize("padded", [False, True])
def test_the_encoder_by_its_formula(padded):
    model, tokens = make("deformable", padded)
    # Cell centres over the size of the image, then over that of each level with its padding.
    points = torch.empty(2, sum(h * w for h, w in SHAPES), LEVELS, 2)
    for image in range(2):
        centers = [
            ((x + 0.5) / sizes[image][1], (y + 0.5) / sizes[image][0])
            for (h, w), sizes in zip(SHAPES, valid_sizes(padded))
            for y in range(h)
            for x in range(w)
        ]
        for level, ((h, w), sizes) in enumerate(zip(SHAPES, valid_sizes(padded))):
            share = torch.tensor([sizes[image][1] / w, sizes[image][0] / h])
            points[image, :, level] = torch.tensor(centers) * share
    x = tokens.features
    for layer in model.encoder.layers:
        query = x + tokens.position
        seen = layer.self_attn(query, x, SHAPES, points, tokens.padding_mask)
        x = layer.norm1(x + seen)
        x = layer.norm2(x + layer.ffn(x))
    torch.testing.assert_close(model.encoder(tokens).features, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["deformable", "dino"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_decoder_by_its_formula(family, padded):
    model, tokens = make(family, padded)
    decoder, queries = model.decoder, model.queries(tokens, make_noised())
    content, anchors = queries.content, queries.anchors
    states, starts = [], []
    for index, layer in enumerate(decoder.layers):
        boxes = torch.empty(*anchors.shape[:2], LEVELS, 4)
        for level, ((h, w), sizes) in enumerate(zip(SHAPES, valid_sizes(padded))):
            for image, (height, width) in enumerate(sizes):
                share = torch.tensor([width / w, height / h, width / w, height / h])
                boxes[image, :, level] = anchors[image] * share
        # The finest level's boxes are what positions code.
        position = decoder.anchor_position(encode_anchors(boxes[:, :, 0], D // 2))
        if family == "deformable" and index > 0:
            position = position * decoder.position_scale(content)
        content = layer.norm1(content + layer.self_attn(content, position, queries.allowed))
        seen = layer.cross_attn(
            content + position, tokens.features, SHAPES, boxes, tokens.padding_mask
        )
        content = layer.norm2(content + seen)
        content = layer.norm3(content + layer.ffn(content))
        states.append(decoder.norm(content) if family == "dino" else content)
        starts.append(anchors)
        anchors = model.heads.refine(index, content, anchors)  # in front of the final norm
    found, found_starts = decoder(queries, tokens, model.heads.refine)
    torch.testing.assert_close(found, torch.stack(states), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_starts, torch.stack(starts), rtol=1e-4, atol=1e-5)


def test_cross_attention_starts_in_a_ring():
    """Though all other matrices start by Xavier."""
    for layer in DeformableDecoder(D, **DEFORMABLE, num_layers=2).layers:
        attention = layer.cross_attn
        assert not attention.offsets.weight.any() and not attention.weights.weight.any()
        ring = attention.offsets.bias.view(4, LEVELS, 2, 2)[:, :, 1]
        expected = torch.tensor([[2.0, 0], [0, 2], [-2, 0], [0, -2]])[:, None].expand_as(ring)
        torch.testing.assert_close(ring, expected, rtol=0, atol=1e-6)


def test_levels_are_weighed_by_the_query_of_the_self_attention():
    torch.manual_seed(0)
    decoder = DABDecoder(D, **SMALL, num_layers=1, num_levels=LEVELS)
    (layer,), (content, position, sine) = decoder.layers, torch.randn(3, 2, QUERIES, D)
    seen = []
    layer.level_weights.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    layer(content, position, None, sine, make_tokens(SHAPES))
    attention = layer.self_attn
    expected = attention.query_content(content) + attention.query_position(position)
    torch.testing.assert_close(seen[0], expected)


def test_evaluation_keeps_nothing_for_a_backward_pass():
    model, tokens = make("dino", padded=False)
    refined = []

    def refine(*args):
        refined.append(model.heads.refine(*args))
        return refined[-1]

    with torch.no_grad():
        model.decoder(model.queries(tokens), tokens, refine)
    assert len(refined) == 2 and not any(boxes.requires_grad for boxes in refined)


def test_checkpointing_reads_no_state_of_random_numbers(monkeypatch):
    """On an accelerator that waits."""
    model, tokens = Transformer("dino", activation_checkpointing=True), make_tokens(SHAPES)
    monkeypatch.setattr(torch, "get_rng_state", None)
    boxes = model.predict(model.encoder(tokens)).boxes
    boxes.sum().backward()


def test_checkpointing_does_not_hold_the_values_of_all_layers():
    for switch in (False, True):
        model = Transformer("deformable", activation_checkpointing=switch)
        tokens = make_tokens(SHAPES)
        _, values, _ = model.decoder.prepare(tokens)
        assert all((value is tokens.features) == switch for value in values)
