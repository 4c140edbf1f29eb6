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


def test_activation_checkpointing_changes_no_feature_and_no_gradient():
    torch.manual_seed(0)
    plain = build_resnet(50, out_features=["res3", "res5"])
    checkpointed = build_resnet(50, out_features=["res3", "res5"], activation_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    calls = []
    checkpointed.res4[2].conv2.register_forward_hook(lambda *args: calls.append(1))
    image = torch.randn(2, 3, 65, 97)
    for backbone in (plain, checkpointed):
        sum(feature.square().mean() for feature in backbone(image).values()).backward()
    assert len(calls) == 2  # forward, and again in backward
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    with torch.no_grad():
        assert torch.equal(plain(image)["res5"], checkpointed(image)["res5"])


@pytest.mark.parametrize("norm, refused", [("BN", True), ("SyncBN", True), ("GN", False)])
def test_checkpointing_with_trained_batch_norms_is_refused(norm, refused):
    if refused:
        with pytest.raises(ValueError, match="runs every block twice, which trained batch norms"):
            build_resnet(50, norm=norm, activation_checkpointing=True)
    else:
        build_resnet(50, norm=norm, activation_checkpointing=True)
