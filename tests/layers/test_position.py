"""Sine codes: against the formula written out, number by number."""

import math

import pytest
import torch

from dn_detr.layers import SinePositionEncoding, encode_anchors, sine_encode


@pytest.mark.parametrize("temperature", [20, 10000])
def test_sine_encode_follows_the_formula(temperature):
    value, channels = 0.37, 8
    code = sine_encode(torch.tensor([value]), channels, temperature)[0]
    for j in range(channels):
        angle = 2 * math.pi * value / temperature ** (2 * (j // 2) / channels)
        assert code[j].item() == pytest.approx(
            math.cos(angle) if j % 2 else math.sin(angle), abs=1e-6
        )


def test_anchor_code_has_the_order_y_x_w_h():
    x, y, w, h = anchor = torch.tensor([0.1, 0.2, 0.3, 0.4])
    code = encode_anchors(anchor, channels=6)
    for part, value in zip(code.chunk(4), (y, x, w, h)):
        torch.testing.assert_close(part, sine_encode(value, 6, 10000))


def test_map_code_is_relative_to_the_unpadded_image_and_starts_with_y():
    mask = torch.ones(2, 6, 10, dtype=torch.bool)
    mask[0, :4, :7] = False
    mask[1] = False
    code = SinePositionEncoding(embed_dim=16, temperature=20)(mask)
    assert code.shape == (2, 6, 10, 16)
    alone = SinePositionEncoding(embed_dim=16, temperature=20)(mask[:1, :4, :7])
    torch.testing.assert_close(code[:1, :4, :7], alone)
    cell_y, cell_x = torch.tensor(3 / 6), torch.tensor(8 / 10)  # row 2, column 7, counted from 1
    expected = torch.cat([sine_encode(cell_y, 8, 20), sine_encode(cell_x, 8, 20)])
    torch.testing.assert_close(code[1, 2, 7], expected, rtol=1e-4, atol=1e-4)


def test_an_offset_of_minus_half_codes_cell_centres():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    code = SinePositionEncoding(embed_dim=8, temperature=20, offset=-0.5)(mask)
    anchor = encode_anchors(torch.tensor([2.5 / 4, 0.5 / 4, 0.1, 0.1]), channels=4, temperature=20)
    torch.testing.assert_close(code[0, 0, 2], anchor[:8], rtol=1e-4, atol=1e-4)
