"""What holds for any batch and any arguments."""

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from dn_detr.denoising import DenoisingGenerator  # noqa: E402
from tests.denoising.targets import make_targets  # noqa: E402

batches = st.lists(st.integers(0, 12), min_size=1, max_size=4)
sizes = st.sampled_from([(5, None), (3, None), (1, None), (4, 9), (2, 30), (None, 1), (None, 25)])
switches = st.fixed_dictionaries(
    {name: st.booleans() for name in ("contrastive", "mask_unused", "unknown_negatives")}
)
seeds = st.integers(0, 1000)


@settings(deadline=None, max_examples=60)
@given(batches, sizes, switches, seeds)
def test_every_target_is_reconstructed_once_a_group(counts, size, kwargs, seed):
    groups, budget = size
    torch.manual_seed(seed)
    targets, *_ = make_targets(counts)
    noised = DenoisingGenerator(9, groups, budget, **kwargs)(targets)
    copies = 2 if kwargs["contrastive"] else 1
    if budget is not None:
        assert len(noised) <= copies * budget
    for image, (count, (slots, rows)) in enumerate(zip(counts, noised.assignment().pairs())):
        covered = rows.bincount(minlength=count)
        kept = count if budget is None else min(count, budget)
        assert covered.sum() == noised.groups * kept and (covered == noised.groups).sum() == kept
        assert slots.unique().numel() == slots.numel()
        assert noised.valid[image, slots].all() and noised.positive[slots].all()
        assert noised.valid[image].sum() == copies * slots.numel()


@settings(deadline=None, max_examples=60)
@given(batches, sizes, switches, seeds)
def test_noise_has_its_range_and_depends_on_the_seed_alone(counts, size, kwargs, seed):
    targets, labels, boxes = make_targets(counts, num_classes=9)
    make = DenoisingGenerator(9, *size, **kwargs)

    def noised():
        torch.manual_seed(seed)
        return make(targets)

    first, second = noised(), noised()
    assert torch.equal(first.labels, second.labels) and torch.equal(first.boxes, second.boxes)
    assert torch.equal(first.valid, second.valid)
    assert first.boxes.min() >= 0 and first.boxes.max() <= 1 if len(first) else True
    real = first.labels < 9
    if kwargs["contrastive"] and kwargs["unknown_negatives"]:
        assert torch.equal(real, first.positive.expand_as(real))
        assert (first.labels[~real] == 9).all()
    else:
        assert real.all()
    assert (first.labels >= 0).all()
    # The ground truth is as it was.
    again, *_ = make_targets(counts, num_classes=9)
    assert torch.equal(targets.boxes, again.boxes) and torch.equal(targets.labels, again.labels)


def may_see(noised, image, query, key):
    """The rules of the mask for one pair of queries, in words."""
    group = [i // noised.width if i < len(noised) else None for i in (query, key)]
    if group[1] is None:
        return True  # everyone sees the matching part
    if group[0] != group[1]:
        return False  # neither another group nor the matching part sees ground truth
    return query == key or not noised.mask_unused or bool(noised.valid[image, key])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), switches, st.integers(0, 3))
def test_mask_by_a_loop(counts, kwargs, num_matching):
    targets, *_ = make_targets(counts)
    noised = DenoisingGenerator(9, groups=2, **kwargs)(targets)
    side = len(noised) + num_matching
    mask = noised.attention_mask(num_matching)
    assert mask.shape[-2:] == (side, side)
    assert mask.dim() == (3 if noised.mask_unused else 2)
    for image in range(len(counts)):
        expected = [
            [not may_see(noised, image, query, key) for key in range(side)] for query in range(side)
        ]
        assert mask.expand(len(counts), -1, -1)[image].tolist() == expected
    assert side == 0 or not mask.all(-1).any()  # a row that sees nothing would be NaN
