"""Attention: against the formula in plain matrix products."""

import math

import torch

from dn_detr.layers import ConditionalCrossAttention, ConditionalSelfAttention, encode_anchors

B, Q, S, D, H = 2, 5, 7, 16, 4


def heads(x):
    return x.reshape(x.shape[0], x.shape[1], H, D // H).permute(0, 2, 1, 3)


def plain_attention(query, key, value, allowed=None):
    weights = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if allowed is not None:
        weights = weights.masked_fill(~allowed, -math.inf)
    return (weights.softmax(-1) @ value).permute(0, 2, 1, 3).reshape(B, -1, D)


def test_self_attention_follows_the_formula():
    torch.manual_seed(0)
    attention = ConditionalSelfAttention(D, H).double()
    content, position = torch.randn(2, B, Q, D, dtype=torch.float64)
    allowed = torch.rand(B, 1, Q, Q) > 0.3
    allowed |= torch.eye(Q, dtype=torch.bool)
    query = attention.query_content(content) + attention.query_position(position)
    key = attention.key_content(content) + attention.key_position(position)
    expected = plain_attention(heads(query), heads(key), heads(attention.value(content)), allowed)
    torch.testing.assert_close(attention(content, position, allowed), attention.output(expected))


def test_cross_attention_concatenates_content_and_position_in_every_head():
    torch.manual_seed(0)
    attention = ConditionalCrossAttention(D, H, add_position=True).double()
    content, position, sine = torch.randn(3, B, Q, D, dtype=torch.float64)
    memory, memory_position = torch.randn(2, B, S, D, dtype=torch.float64)
    key_position = attention.key_position(memory_position)
    query = attention.query_content(content) + attention.query_position(position)
    key = attention.key_content(memory) + key_position
    query = torch.cat([heads(query), heads(attention.query_sine(sine))], -1)
    key = torch.cat([heads(key), heads(key_position)], -1)
    expected = attention.output(plain_attention(query, key, heads(attention.value(memory))))
    actual = attention(content, position, sine, memory, memory_position)
    torch.testing.assert_close(actual, expected)


def test_only_a_first_layer_adds_positions_to_contents():
    later = ConditionalCrossAttention(D, H)
    assert later.query_position is None
    content, sine = torch.randn(2, B, Q, D)
    memory, memory_position = torch.randn(2, B, S, D)
    a = later(content, torch.zeros(B, Q, D), sine, memory, memory_position)
    b = later(content, torch.randn(B, Q, D), sine, memory, memory_position)
    assert torch.equal(a, b)


def test_aligned_positions_peak_at_the_nearest_token_in_every_head():
    attention = ConditionalCrossAttention(D, H)
    attention.align_positions()
    centers = torch.linspace(0.05, 0.95, 10)
    tokens = torch.cartesian_prod(centers, centers)
    boxes = torch.cat([tokens, torch.full_like(tokens, 0.2)], 1)
    codes = encode_anchors(boxes, D // 2, temperature=20)[:, :D]
    query = attention.query_sine(codes).view(-1, H, D // H)
    key = attention.key_position(codes).view(-1, H, D // H)
    similarity = torch.einsum("qhd,khd->hqk", query, key)
    expected = torch.arange(len(tokens)).expand(H, -1)
    assert torch.equal(similarity.argmax(-1), expected)
