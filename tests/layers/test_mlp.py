"""Perceptrons."""

import pytest
import torch

from dn_detr.layers import MLP, FeedForward


def test_mlp_has_relu_between_layers_and_nothing_behind_the_last():
    mlp = MLP(3, 8, 2, num_layers=3)
    x = torch.randn(5, 3)
    first, second, third = mlp.layers
    torch.testing.assert_close(mlp(x), third(second(first(x).relu()).relu()))
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(8, 3), (8, 8), (2, 8)]


def test_every_feed_forward_block_has_its_own_slope():
    a, b = FeedForward(4, 8, "prelu"), FeedForward(4, 8, "prelu")
    assert a.activation.weight is not b.activation.weight
    x = torch.randn(2, 4)
    torch.testing.assert_close(
        a(x), a.linear2(torch.nn.functional.prelu(a.linear1(x), torch.tensor([0.25])))
    )


def test_an_unknown_activation_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"\['gelu', 'prelu', 'relu'\], got 'swish'"):
        FeedForward(4, 8, "swish")
