"""Backbones: what published weights rely on."""

import pytest
import torch

from dn_detr.meta_arch import build_resnet, build_small_resnet


@pytest.mark.parametrize("dc5, stride, dilations", [(False, 32, [1, 1, 1]), (True, 16, [1, 2, 2])])
def test_stride_and_dilations_of_the_last_stage(dc5, stride, dilations):
    backbone = build_resnet(50, dc5=dc5)
    assert [block.conv2.dilation[0] for block in backbone.res5] == dilations
    assert backbone.output_shape()["res5"].stride == stride
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 65, 97))["res5"].shape[-2:] == (
            -(-65 // stride),
            -(-97 // stride),
        )


def test_stride_is_in_the_3x3_convolutions():
    block = build_resnet(50).res3[0]
    assert block.conv1.stride == (1, 1) and block.conv2.stride == (2, 2)


def test_stem_and_res2_are_frozen_and_the_rest_trains():
    trained = {n.split(".")[0] for n, p in build_resnet(50).named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}


def test_other_depths_are_refused():
    with pytest.raises(ValueError, match=r"backbone.depth must be one of \(50, 101\), got 34"):
        build_resnet(34)


def test_small_resnet_has_the_stated_strides_and_trains_everything():
    backbone = build_small_resnet(channels=(8, 16, 32), blocks=(1, 2, 1), strides=(1, 2, 2))
    features = backbone(torch.zeros(2, 3, 64, 32))
    assert {k: tuple(v.shape) for k, v in features.items()} == {"res4": (2, 32, 4, 2)}
    assert backbone.output_shape()["res4"].stride == 16
    assert build_small_resnet().output_shape()["res4"].stride == 8
    assert all(p.requires_grad for p in backbone.parameters())
