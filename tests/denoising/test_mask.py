"""Who sees whom: truth tables."""

import torch

from dn_detr.denoising import SHARED, group_attention_mask


def test_truth_table():
    blocked = group_attention_mask(torch.tensor([0, 0, 1, SHARED, SHARED]))
    assert blocked.int().tolist() == [
        [0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]


def test_groups_without_shared_queries_are_block_diagonal():
    groups = torch.arange(3).repeat_interleave(4)
    expected = ~torch.block_diag(*[torch.ones(4, 4, dtype=torch.bool)] * 3)
    assert torch.equal(group_attention_mask(groups), expected)
