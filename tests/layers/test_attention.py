"""Attention: against the formula in plain matrix products."""

import math

import torch

from dn_detr.layers import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    SelfAttention,
    encode_anchors,
)

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


def test_self_attention_is_that_of_pytorch():
    torch.manual_seed(0)
    own, theirs = SelfAttention(D, H), torch.nn.MultiheadAttention(D, H, batch_first=True)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(
        {
            "in_proj_weight": own.in_proj.weight,
            "in_proj_bias": own.in_proj.bias,
            "out_proj.weight": own.output.weight,
            "out_proj.bias": own.output.bias,
        }
    )
    content, position = torch.randn(2, 2, 5, D)
    blocked = torch.rand(2, 5, 5) < 0.4
    blocked[:, range(5), range(5)] = False
    query = content + position
    expected, _ = theirs(query, query, content, attn_mask=blocked.repeat_interleave(H, 0))
    actual = own(content, position, allowed=~blocked[:, None])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own(content, position), theirs(query, query, content)[0])


def test_levels_are_attended_to_apart_and_weighed():
    torch.manual_seed(0)
    attention = ConditionalCrossAttention(D, H, add_position=True)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    queries, memory = torch.randn(3, 2, 5, D), torch.randn(2, 2, 11, D)
    sizes = [6, 4, 1]
    allowed = torch.rand(2, 1, 1, 11) < 0.7
    allowed[..., [0, 6, 10]] = True  # something in each level
    weights = torch.randn(2, 5, 3).softmax(-1)
    actual = attention(*queries, *memory, allowed, sizes, weights)
    start, expected = 0, 0
    for level, size in enumerate(sizes):
        part = slice(start, start + size)
        output = attention(*queries, *memory[:, :, part], allowed[..., part])
        expected, start = expected + output * weights[..., level, None], start + size
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # One softmax over all of them would be something else
    together = attention(*queries, *memory, allowed)
    assert (actual - together).abs().max() > 1e-2
