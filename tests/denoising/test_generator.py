"""Noised targets: layout, mask, split, assignment and flat form agree, also with the paper."""

import doctest

import pytest
import torch

from dn_detr.denoising import DenoisingGenerator
from dn_detr.layers import Targets
from tests.denoising.targets import COUNTS, make_targets


def silent(**kwargs):
    """A generator without noise, so that the layout shows."""
    return DenoisingGenerator(9, label_noise=0, center_noise=0, size_noise=0, **kwargs)


@pytest.mark.parametrize("counts", COUNTS)
def test_slot_of_group_and_target(counts):
    targets, labels, boxes = make_targets(counts)
    noised = silent(groups=4)(targets)
    width = max(counts)
    assert noised.width == width and len(noised) == 4 * width
    for image, count in enumerate(counts):
        for group in range(4):
            for m in range(width):
                slot = group * width + m
                assert noised.valid[image, slot] == (m < count)
                if m < count:
                    assert noised.labels[image, slot] == labels[image][m]
                    assert torch.equal(noised.boxes[image, slot], boxes[image][m])


@pytest.mark.parametrize("counts", COUNTS)
def test_flat_form_lists_every_noised_target_once(counts):
    targets, labels, boxes = make_targets(counts)
    noised = DenoisingGenerator(9, groups=3)(targets)
    flat = noised.flat()
    assert len(flat.labels) == 3 * sum(counts) == int(noised.valid.sum())
    assert torch.equal(flat.boxes, noised.boxes[flat.image, flat.slot])
    assert torch.equal(flat.labels, noised.labels[flat.image, flat.slot])
    assert noised.valid[flat.image, flat.slot].all()
    assert len(set(zip(flat.image.tolist(), flat.slot.tolist()))) == len(flat.slot)
    clean = silent(groups=3)(targets).flat()
    for image, row, label, box in zip(clean.image, clean.row, clean.labels, clean.boxes):
        assert labels[image][row] == label and torch.equal(boxes[image][row], box)


@pytest.mark.parametrize("counts", COUNTS)
def test_assignment_covers_every_object_once_a_group(counts):
    targets, *_ = make_targets(counts)
    noised = DenoisingGenerator(9, groups=5)(targets)
    for (slots, rows), count in zip(noised.assignment().pairs(), counts):
        assert slots.unique().numel() == 5 * count
        assert torch.equal(rows.bincount(minlength=count), torch.full((count,), 5))
        assert torch.equal(slots % max(noised.width, 1), rows)


def test_published_mask_by_its_three_rules():
    targets, *_ = make_targets((2, 3))
    blocked = silent(groups=2, mask_unused=False)(targets).attention_mask(num_matching=4)
    for query in range(10):
        for key in range(10):
            same_group = query < 6 and key < 6 and query // 3 == key // 3
            assert blocked[query, key] == (key < 6 and not same_group)


def test_unused_slots_can_be_hidden_from_the_others():
    targets, *_ = make_targets((2, 3))
    noised = silent(groups=2)(targets)
    published = silent(groups=2, mask_unused=False)(targets).attention_mask(4)
    blocked = noised.attention_mask(num_matching=4)
    assert blocked.shape == (2, 10, 10)
    assert torch.equal(blocked[1], published)  # the full image has no unused slot
    unused = [2, 5]
    for query in range(10):
        for key in range(10):
            hidden = key in unused and query != key
            assert blocked[0, query, key] == (bool(published[query, key]) or hidden)
    assert not blocked.all(-1).any()  # a row that sees nothing would be NaN


def test_split_undoes_the_concatenation():
    targets, *_ = make_targets((2, 3))
    noised = silent(groups=2)(targets)
    denoising, matching = torch.randn(4, 2, 6, 5), torch.randn(4, 2, 8, 5)
    a, b = noised.split(torch.cat([denoising, matching], 2), dim=2)
    assert torch.equal(a, denoising) and torch.equal(b, matching)


def test_copies_are_noised_independently():
    torch.manual_seed(0)
    targets, *_ = make_targets((4, 4))
    boxes = DenoisingGenerator(9, groups=5)(targets).boxes.view(2, 5, 4, 4)
    assert (boxes[:, 0] != boxes[:, 1]).all()


@pytest.mark.parametrize(
    "kwargs",
    [dict(), dict(contrastive=True, unknown_negatives=True), dict(contrastive=True, budget=4)],
)
def test_many_more_targets_cost_no_more_operations(kwargs):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Counter.calls += 1
            # What makes the host wait for an accelerator: reading values, or shapes that depend on
            # them.
            assert function not in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
                torch.ops.aten.masked_select.default,
            ), function
            return function(*args, **(kwargs or {}))

    calls = []
    for counts in ((5, 7), (90, 150, 7, 0)):
        targets, *_ = make_targets(counts)
        Counter.calls = 0
        with Counter():
            noised = DenoisingGenerator(9, groups=5, **kwargs)(targets)
            noised.attention_mask(300), noised.assignment(), noised.classified
        calls.append(Counter.calls)
    assert calls[0] == calls[1] < 90


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(groups=0), "groups must be in 1..inf, got 0"),
        (dict(label_noise=1.5), r"label_noise must be in 0..1, got 1.5"),
        (dict(size_noise=-0.1), r"size_noise must be in 0..1, got -0.1"),
        (dict(budget=0), "budget must be in 1..inf, got 0"),
        (dict(corner_noise=-1.0), "corner_noise must be in 0..inf, got -1.0"),
        (dict(groups=None), r"set groups \(5 in DN-DETR\), budget \(100 in DINO\) or both"),
        (dict(label_choices=[3, 9]), r"label_choices must be in 0..8, got \[3, 9\]"),
    ],
)
def test_numbers_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DenoisingGenerator(9, **kwargs)


def test_the_docstring_example_runs():
    scope = {"torch": torch, "Targets": Targets, "DenoisingGenerator": DenoisingGenerator}
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(recurse=False).find(DenoisingGenerator, globs=scope):
        runner.run(test)
    assert runner.failures == 0 and runner.tries > 0
