"""Necks: shapes, levels, masks and positions of the tokens."""

import pytest
import torch

from dn_detr.layers import SinePositionEncoding
from dn_detr.modeling import MultiLevelNeck
from dn_detr.modeling.neck import cell_mask
from tests.modeling.families import LEVELS, D, make_inputs, multi_level_neck


def test_levels_stand_one_after_the_other():
    torch.manual_seed(0)
    neck, (features, mask) = multi_level_neck(), make_inputs(height=5, width=8)
    tokens = neck(features, mask, padded=False)
    assert tokens.shapes == ((10, 16), (5, 8), (3, 4)) and tokens.padding_mask is None
    assert tokens.valid_ratios is None and tokens.level_sizes == [160, 40, 12]
    finest, middle, coarse = tokens.features.split(tokens.level_sizes, dim=1)
    expected = neck.projections[0](features["res4"])
    torch.testing.assert_close(finest[1, 16 * 3 + 5], expected[1, :, 3, 5])
    torch.testing.assert_close(middle[0, 7], neck.projections[1](features["res5"])[0, :, 0, 7])
    # The first extra level is made of the backbone's last map, not of its projection
    expected = neck.projections[2](features["res5"])
    torch.testing.assert_close(coarse, expected.flatten(2).transpose(1, 2))


def test_further_levels_are_made_of_the_one_before():
    neck = MultiLevelNeck(dict(res5=7), D, 4, SinePositionEncoding(D), norm_groups=4)
    features, mask = make_inputs(height=9, width=16)
    tokens = neck(features, mask, padded=False)
    assert tokens.shapes == ((9, 16), (5, 8), (3, 4), (2, 2))
    levels = tokens.features.split(tokens.level_sizes, dim=1)
    before = levels[2].transpose(1, 2).unflatten(2, (3, 4))
    torch.testing.assert_close(
        levels[3].transpose(1, 2).unflatten(2, (2, 2)), neck.projections[3](before)
    )


def test_positions_code_the_level():
    neck, inputs = multi_level_neck(), make_inputs()
    position = neck(*inputs, padded=False).position
    with torch.no_grad():
        neck.level_embed[2] += 5.0
    change = neck(*inputs, padded=False).position - position
    by_level = [level.unique().tolist() for level in change.round().split([192, 48, 12], dim=1)]
    assert by_level == [[0.0], [0.0], [5.0]]


def test_levels_need_not_be_coded():
    neck = MultiLevelNeck(
        dict(res5=7), D, 2, SinePositionEncoding(D), norm_groups=4, level_embed=False
    )
    finest, coarse = neck(*make_inputs(), padded=False).position.split([48, 12], dim=1)
    torch.testing.assert_close(finest[0, -1], coarse[0, -1])  # the last cells, both at 1
    assert not [name for name, _ in neck.named_parameters() if "level" in name]


def test_masks_ratios_and_centers_of_a_padded_image():
    neck, (features, mask) = multi_level_neck(), make_inputs(height=6, width=8)
    mask[1, 48:] = True  # half of the height
    mask[1, :, 100:] = True  # 12.5 cells of 16 in the finest level
    tokens = neck(features, mask, padded=True)
    finest, middle, coarse = tokens.padding_mask[1].split(tokens.level_sizes)
    assert finest.view(12, 16)[0].tolist() == [False] * 13 + [True] * 3  # by the first pixel
    assert middle.view(6, 8)[:, 0].tolist() == [False] * 3 + [True] * 3
    assert not tokens.padding_mask[0].any()
    torch.testing.assert_close(
        tokens.valid_ratios[1], torch.tensor([[13 / 16, 0.5], [7 / 8, 0.5], [1.0, 2 / 3]])
    )
    assert (tokens.valid_ratios[0] == 1).all()
    centers = tokens.centers.split(tokens.level_sizes, dim=1)[0].unflatten(1, (12, 16))
    torch.testing.assert_close(centers[1, 2, 3], torch.tensor([3.5 / 13, 2.5 / 6]))
    torch.testing.assert_close(centers[0, 2, 3], torch.tensor([3.5 / 16, 2.5 / 12]))


def test_xavier_is_a_choice():
    torch.manual_seed(0)
    args = (dict(res4=512), 64, 2, SinePositionEncoding(64))
    for xavier in (True, False):
        neck = MultiLevelNeck(*args, xavier=xavier)
        assert all((conv.bias == 0).all() == xavier for conv, _ in neck.projections)


@pytest.mark.parametrize("stride", [8, 16, 32, 64])
@pytest.mark.parametrize("padded", [(300, 400), (301, 337), (640, 512), (65, 63)])
def test_a_padded_image_has_as_many_cells_as_alone(stride, padded):
    """Whatever the size of its batch; convolutions give ceil(side / stride) cells."""
    shape = tuple(-(-side // stride) for side in padded)
    for height, width in ((240, 320), (33, 61), (64, 17), (1, 1)):
        size = min(height, padded[0]), min(width, padded[1])
        mask = torch.ones(1, *padded, dtype=torch.bool)
        mask[:, : size[0], : size[1]] = False
        inside = ~cell_mask(mask, shape, exact=True)[0]
        assert inside.shape == shape
        assert inside[:, 0].sum() == -(-size[0] // stride)
        assert inside[0].sum() == -(-size[1] // stride)


def test_the_published_mask_gives_a_padded_image_a_cell_more():
    mask = torch.zeros(1, 300, 400, dtype=torch.bool)
    mask[:, 240:] = True
    cells = [(~cell_mask(mask, (19, 25), exact)[0, :, 0]).sum().item() for exact in (True, False)]
    assert cells == [15, 16]


def test_strides_that_are_no_powers_of_two_are_masked_as_published():
    mask = torch.zeros(1, 70, 140, dtype=torch.bool)
    mask[:, :, 71:] = True
    inside = ~cell_mask(mask, (5, 10), exact=True)  # stride 14
    assert inside.shape == (1, 5, 10) and inside[0, 0].sum() == 6


@pytest.mark.parametrize("in_features, levels", [({}, 1), (dict(res4=5, res5=7), 1)])
def test_too_few_levels_are_refused(in_features, levels):
    with pytest.raises(ValueError, match="num_levels must be at least the number of in_features"):
        MultiLevelNeck(in_features, D, levels, SinePositionEncoding(D))


def test_channels_have_to_fit_the_norms():
    with pytest.raises(ValueError) as error:
        MultiLevelNeck(dict(res5=7), 100, 1, SinePositionEncoding(100))
    text = "neck: embed_dim must be a multiple of norm_groups, 32; got embed_dim=100"
    assert str(error.value) == text


def test_the_small_families_have_three_levels():
    assert len(multi_level_neck().projections) == LEVELS
