"""The budget of noised targets: fewer groups, then fewer targets, and a word about both."""

import logging

import pytest
import torch

from dn_detr.denoising import DenoisingGenerator
from tests.denoising.targets import make_targets

LOGGER = "dn_detr.denoising.generator"


def silent(**kwargs):
    """A generator without noise, so that it shows which target a slot holds."""
    noise = {name: 0 for name in ("label_noise", "center_noise", "size_noise", "corner_noise")}
    return DenoisingGenerator(9, **noise, **kwargs)


@pytest.mark.fault(49)
@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize(
    "most, groups, expected",
    [
        *((1, None, 100), (7, None, 14), (60, None, 1), (100, None, 1), (500, None, 1)),
        *((1, 5, 5), (20, 5, 5), (21, 5, 4), (60, 5, 1), (101, 5, 1), (0, 5, 5)),
    ],
)
def test_slots_of_an_image_keep_within_the_budget(most, groups, expected, contrastive):
    """Counted in pairs of a positive and a negative: the rule of DINO's published code."""
    targets, *_ = make_targets((most, 0))
    noised = DenoisingGenerator(9, groups, budget=100, contrastive=contrastive)(targets)
    assert noised.groups == expected
    assert noised.targets_per_group == min(most, 100)
    assert len(noised) == expected * min(most, 100) * (2 if contrastive else 1)


def test_without_a_budget_nothing_is_left_out():
    targets, *_ = make_targets((150, 3))
    noised = DenoisingGenerator(9, groups=5)(targets)
    assert len(noised) == 750 and noised.rows is None


@pytest.mark.fault(49)
@pytest.mark.parametrize("contrastive", [False, True])
def test_a_crowd_is_sampled_and_others_are_complete(contrastive):
    torch.manual_seed(0)
    targets, labels, boxes = make_targets((30, 8, 3, 0, 9))
    noised = silent(groups=3, budget=8, contrastive=contrastive)(targets)
    assert noised.groups == 1 and noised.counts == (8, 8, 3, 0, 8)
    flat = noised.flat()
    copies = 2 if contrastive else 1
    for image, count in enumerate(noised.counts):
        rows = flat.row[flat.image == image].tolist()
        assert len(rows) == copies * count
        kept = rows[:count]
        assert kept == sorted(set(kept)) and rows == kept * copies
        assert torch.equal(flat.labels[flat.image == image], labels[image][rows])
        torch.testing.assert_close(flat.boxes[flat.image == image], boxes[image][rows])
        if count == len(labels[image]):
            assert kept == list(range(count))
        slots, answers = noised.assignment().pairs()[image]
        assert answers.tolist() == kept and slots.tolist() == list(range(count))
    assert torch.equal(noised.valid.sum(1), copies * torch.tensor(noised.counts))


def test_every_target_is_as_likely_to_be_drawn():
    torch.manual_seed(0)
    targets, *_ = make_targets((40, 12))
    drawn = torch.zeros(40)
    for _ in range(600):
        drawn[silent(groups=None, budget=10)(targets).rows[0]] += 1
    # A binomial variable with 600 tries at 1/4: a standard deviation is 10.6.
    assert drawn.sum() == 6000 and (drawn - 150).abs().max() < 45


@pytest.mark.fault(49)
def test_the_budget_reports_once_what_it_costs(caplog):
    generator = DenoisingGenerator(9, groups=5, budget=100)
    with caplog.at_level(logging.WARNING, LOGGER):
        generator(make_targets((20, 3))[0])
        assert not caplog.records
        for most in (30, 40, 500, 600):
            generator(make_targets((most, 3))[0])
    assert [record.getMessage() for record in caplog.records] == [
        "denoising: an image has 30 objects; with budget=100 that leaves 3 of 5 groups, "
        "max(min(groups, budget // objects), 1). All groups: set model.denoising.budget=150. This "
        "is said once.",
        "denoising: an image has 500 objects, more than budget=100: 100 of them are noised, drawn "
        "anew in every step. All of them: set model.denoising.budget=500; self-attention's memory "
        "grows with its square. This is said once.",
    ]


def test_groups_by_the_budget_alone_are_no_news(caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        for most in (0, 7, 60, 100):
            DenoisingGenerator(9, groups=None, budget=100)(make_targets((most,))[0])
    assert not caplog.records
