"""Contrastive denoising: the kind, noise, label and target of every slot, for any batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert

from dn_detr.denoising import DenoisingGenerator
from dn_detr.layers import Targets
from tests.denoising.targets import COUNTS, make_targets
from tests.golden.seeded import golden

BATCHES = [(3,), (2, 5), (5, 2), (3, 3), (4, 0, 2), (1, 6, 3)]


def contrastive(**kwargs):
    return DenoisingGenerator(9, contrastive=True, **kwargs)


def shifts(noised_box, box):
    """How far each corner coordinate has moved, in halves of width or height."""
    moved = box_convert(noised_box, "cxcywh", "xyxy") - box_convert(box, "cxcywh", "xyxy")
    return (moved / (box[[2, 3, 2, 3]] / 2)).abs()


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("counts", BATCHES)
def test_every_slot_of_every_image(counts, unknown):
    """Bug of the DN-DETR authors' port of DINO: with several images, kinds were mixed up."""
    torch.manual_seed(0)
    targets, labels, boxes = make_targets(counts)
    # Up to a scale of 0.5 the corners of negatives do not pass each other: boxes tell their noise.
    make = contrastive(groups=4, label_noise=0, corner_noise=0.5, unknown_negatives=unknown)
    noised, most = make(targets), max(counts)
    assert (noised.width, noised.targets_per_group, len(noised)) == (2 * most, most, 8 * most)
    answers = [dict(zip(*(x.tolist() for x in pair))) for pair in noised.assignment().pairs()]
    for image, count in enumerate(counts):
        for slot in range(len(noised)):
            negative, m = slot % (2 * most) >= most, slot % most
            assert noised.positive[slot] == (not negative)
            assert noised.valid[image, slot] == noised.classified[image, slot] == (m < count)
            assert answers[image].get(slot) == (m if m < count and not negative else None)
            if m < count:
                moved = shifts(noised.boxes[image, slot], boxes[image][m])
                low, high = (0.5, 1.0) if negative else (0.0, 0.5)
                assert (moved >= low - 1e-4).all() and (moved <= high + 1e-4).all()
                label = 9 if negative and unknown else labels[image][m]
                assert noised.labels[image, slot] == label


def test_labels_of_positives_and_negatives_are_noised_alike():
    torch.manual_seed(0)
    targets, *_ = make_targets((400, 400))
    noised = contrastive(groups=20, label_noise=0.25)(targets)
    clean = contrastive(groups=20, label_noise=0)(targets)
    for kind in (noised.positive, ~noised.positive):
        changed = (noised.labels != clean.labels)[:, kind].float().mean().item()
        assert changed == pytest.approx(0.25 * 8 / 9, abs=0.01)
    assert 0 <= noised.labels.min() and noised.labels.max() <= 8


def test_kinds_are_noised_independently():
    torch.manual_seed(0)
    targets, *_ = make_targets((4, 4))
    boxes = contrastive(groups=3, corner_noise=0.4)(targets).boxes.view(2, 6, 4, 4)
    for a in range(6):
        for b in range(a):
            assert (boxes[:, a] != boxes[:, b]).all()


@pytest.mark.parametrize("swap", [False, True])
def test_inverted_negatives_have_no_size_or_are_swapped(swap):
    torch.manual_seed(0)
    targets, *_ = make_targets((50,))
    noised = contrastive(swap_inverted=swap)(targets)
    sizes = noised.boxes[..., 2:].amin(-1)
    assert (sizes[:, noised.positive] > 0).all()
    assert (sizes[:, ~noised.positive] > 0).all() == swap


def test_slots_without_a_target_can_be_classified():
    targets, *_ = make_targets((2, 0, 3))
    noised = contrastive(groups=2, classify_unused=True)(targets)
    assert noised.classified.all() and noised.classified.shape == noised.valid.shape
    assert noised.valid.sum(1).tolist() == [8, 0, 12]
    assert noised.assignment().valid.sum().item() == 2 * 5


@pytest.mark.parametrize("counts", COUNTS)
def test_flat_form_knows_positives(counts):
    targets, *_ = make_targets(counts)
    noised = contrastive(groups=3)(targets)
    flat = noised.flat()
    assert len(flat.labels) == 6 * sum(counts) == int(noised.valid.sum())
    assert len(set(zip(flat.image.tolist(), flat.slot.tolist()))) == len(flat.slot)
    assert noised.valid[flat.image, flat.slot].all()
    assert torch.equal(flat.boxes, noised.boxes[flat.image, flat.slot])
    assert torch.equal(flat.positive, noised.positive[flat.slot])
    known = {
        (image, slot, row)
        for image, pair in enumerate(noised.assignment().pairs())
        for slot, row in zip(*(x.tolist() for x in pair))
    }
    entries = zip(flat.image.tolist(), flat.slot.tolist(), flat.row.tolist())
    assert known == {e for e, positive in zip(entries, flat.positive) if positive}


def test_positives_and_negatives_of_a_group_see_each_other():
    targets, *_ = make_targets((2, 3))
    blocked = contrastive(groups=2, mask_unused=False)(targets).attention_mask(num_matching=4)
    for query in range(16):
        for key in range(16):
            same_group = query < 12 and key < 12 and query // 6 == key // 6
            assert blocked[query, key] == (key < 12 and not same_group)


@pytest.fixture
def dino():
    """What the authors' code made of two images with 3 and 5 objects."""
    return golden("dino_r50_4scale")


@pytest.fixture
def ours(dino):
    """Our noise on the same objects, with the arguments of DINO."""
    torch.manual_seed(0)
    counts = dino["target_counts"].tolist()
    targets = Targets.pad(
        torch.from_numpy(dino["target_labels"]).split(counts),
        torch.from_numpy(dino["target_boxes"]).split(counts),
    )
    make = DenoisingGenerator(
        91, groups=None, budget=100, contrastive=True, classify_unused=True, mask_unused=False
    )
    return make(targets)


def test_layout_and_mask_are_those_of_dino(ours, dino):
    assert ours.groups == dino["dn_groups"]
    assert np.array_equal(ours.valid, dino["dn_valid"])
    assert np.array_equal(ours.positive, dino["dn_positive"])
    assert np.array_equal(np.arange(len(ours)) // ours.width, dino["dn_group_of_slot"])
    flat, rows = ours.flat(), np.full_like(dino["dn_target_index"], -1)
    rows[flat.image, flat.slot] = flat.row
    assert np.array_equal(rows, dino["dn_target_index"])
    side = int(dino["dn_attn_mask_side"])
    mask = np.unpackbits(dino["dn_attn_mask"], count=side**2).reshape(side, side)
    assert np.array_equal(ours.attention_mask(num_matching=900), mask.astype(bool))


def test_the_authors_noise_has_our_bounds(ours, dino):
    theirs = replace(ours, boxes=torch.from_numpy(dino["dn_anchors"]))
    boxes = torch.from_numpy(dino["target_boxes"]).split(list(ours.counts))
    for noised in (ours, theirs):
        flat = noised.flat()
        clean = torch.stack([boxes[image][row] for image, row in zip(flat.image, flat.row)])
        corners = box_convert(flat.boxes, "cxcywh", "xyxy")
        moved = (corners - box_convert(clean, "cxcywh", "xyxy")).abs()
        half, rounding = clean[:, [2, 3, 2, 3]] / 2, 2e-3  # the authors' logits stop at 1e-3
        assert (moved - half)[flat.positive].max() < rounding
        # Beyond the first half of the object, unless the image ended or the corners had met.
        ended = (corners < rounding) | (corners > 1 - rounding)
        met = (flat.boxes[:, 2:] < rounding).repeat(1, 2)
        free = ~(ended | met) & ~flat.positive[:, None]
        assert (half - moved)[free].max() < rounding and free.sum() > 50
        assert (moved - 2 * half)[free].max() < rounding
