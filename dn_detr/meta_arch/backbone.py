"""ResNets as DETR and its descendants use them, built of detectron2's blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dn_detr.layers import checkpointing
from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.modeling.backbone import BasicStem, ResNet  # noqa: E402
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock  # noqa: E402

DEPTHS = (50, 101)


class CheckpointedBottleneckBlock(BottleneckBlock):
    """The same block; its activations are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpointing.run(super().forward, x, checkpointed=True)


def build_resnet(
    depth: int = 50,
    dc5: bool = False,
    freeze_at: int = 2,
    out_features: Sequence[str] = ("res5",),
    norm: str = "FrozenBN",
    activation_checkpointing: bool = False,
) -> ResNet:
    """ResNet for RGB weights of torchvision: stride in the 3x3 convolutions, frozen batch norms.

    Args:
        depth: 50 or 101.
        dc5: last stage dilated instead of strided, stride 16 in all. Its blocks have dilations 1,
            2, 2, as torchvision's replacement of strides by dilation gives; detectron2's
            RES5_DILATION=2 gives 2, 2, 2, which does not fit published weights. Nothing in a
            checkpoint tells C5 from DC5.
        freeze_at: number of stages without training, counted from the stem: 2 freezes stem and
            res2, as published.
        out_features: stages to return, "res2" .. "res5".
        norm: normalisation layer, in detectron2's words.
        activation_checkpointing: less memory for more time: blocks keep only their inputs. With
            trained batch norms ("BN", "SyncBN") every step would count twice in their statistics.

    Raises:
        ValueError: another depth; checkpointing with trained batch norms.
    """
    if depth not in DEPTHS:
        raise ValueError(f"backbone.depth must be one of {DEPTHS}, got {depth}")
    if activation_checkpointing and "BN" in norm and norm != "FrozenBN":
        raise ValueError(
            f"backbone.activation_checkpointing runs every block twice, which trained batch norms "
            f"(norm={norm!r}) count twice; use FrozenBN, GN or LN"
        )
    block = CheckpointedBottleneckBlock if activation_checkpointing else BottleneckBlock
    stages = ResNet.make_default_stages(depth, block, norm=norm, stride_in_1x1=False)
    if dc5:
        stages[-1] = ResNet.make_stage(
            block,
            num_blocks=3,
            stride_per_block=[1, 1, 1],
            dilation_per_block=[1, 2, 2],
            in_channels=1024,
            bottleneck_channels=512,
            out_channels=2048,
            norm=norm,
            stride_in_1x1=False,
        )
    stem = BasicStem(in_channels=3, out_channels=64, norm=norm)
    return ResNet(stem, stages, out_features=list(out_features), freeze_at=freeze_at)


def build_small_resnet(
    channels: Sequence[int] = (32, 64, 128),
    blocks: Sequence[int] = (1, 2, 1),
    strides: Sequence[int] = (1, 2, 1),
    norm: str = "BN",
    num_outputs: int = 1,
) -> ResNet:
    """Narrow ResNet of two-convolution blocks for small images, from scratch; nothing is frozen.

    Args:
        channels: channels of the stages res2, res3, ....
        blocks: number of blocks in each.
        strides: stride of each, behind the stem's 4: the default output has stride 8.
        norm: normalisation layer, in detectron2's words.
        num_outputs: the last so many stages are returned.
    """
    stages, in_channels = [], channels[0]
    for out_channels, num_blocks, stride in zip(channels, blocks, strides, strict=True):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                stride_per_block=[stride] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=norm,
            )
        )
        in_channels = out_channels
    stem = BasicStem(in_channels=3, out_channels=channels[0], norm=norm)
    names = [f"res{i + 2}" for i in range(len(stages))]
    resnet = ResNet(stem, stages, out_features=names[-num_outputs:])
    # The layout that convolutions on a CPU prefer; it passes from the weights to the feature maps.
    return resnet.to(memory_format=torch.channels_last)
