"""Numbers that follow from what they are for."""

import random

import numpy as np
import pytest
import torch

from dn_detr.data.seeding import seed_generators, seeded


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_numbers_follow_from_the_seed():
    with seeded(1, 2):
        first = draw()
    draw()
    with seeded(1, 2):
        assert draw() == first
    seed_generators(1, 2)
    assert draw() == first


@pytest.mark.parametrize("other", [(1, 3), (2, 2), (2, 1), (1,), (1, 2, 0), (1, 2, 1), (1, 2**40)])
def test_other_seeds_give_other_numbers(other):
    with seeded(1, 2):
        first = draw()
    with seeded(*other):
        assert all(a != b for a, b in zip(draw(), first))


def test_the_callers_generators_go_on():
    seed_generators(0)
    expected = [draw(), draw()]
    seed_generators(0)
    found = [draw()]
    with pytest.raises(KeyError), seeded(5):
        draw()
        raise KeyError
    assert [*found, draw()] == expected
