"""Matching: against SciPy on costs written out image by image."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

from dn_detr.layers import Targets
from dn_detr.modeling import HungarianMatcher, Predictions, SetCriterion, matcher


def make_case(counts, num_layers=3, num_queries=8, num_classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (num_layers, len(counts), num_queries)
    predictions = Predictions(
        torch.randn(*shape, num_classes, generator=g), torch.rand(*shape, 4, generator=g)
    )
    labels = [torch.randint(0, num_classes, (n,), generator=g) for n in counts]
    boxes = [torch.rand(n, 4, generator=g) * 0.5 + 0.1 for n in counts]
    return predictions, labels, boxes


def make_encoder(counts, num_tokens, num_classes=5, seed=1):
    return make_case(counts, 1, num_tokens, num_classes, seed)[0]


def plain_cost(logits, boxes, labels, wanted):
    """DETR's cost with the focal class term, for one layer of one image: [Q, m]"""
    p = logits.sigmoid()[:, labels]
    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    giou = generalized_box_iou(
        box_convert(boxes, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy")
    )
    return 2 * focal + 5 * torch.cdist(boxes, wanted, p=1) - 2 * giou


def assert_optimal(assignment, predictions, labels, boxes):
    """One-to-one pairs at SciPy's cost on the plain costs of all pairs."""
    num_layers, _, num_queries, num_classes = predictions.logits.shape
    assert assignment.slots.shape[:2] == predictions.logits.shape[:2]
    for layer in range(num_layers):
        for image, (slots, rows) in enumerate(assignment.pairs(layer)):
            label = labels[image] if num_classes > 1 else torch.zeros_like(labels[image])
            cost = plain_cost(
                predictions.logits[layer, image],
                predictions.boxes[layer, image],
                label,
                boxes[image],
            )
            best = cost[linear_sum_assignment(cost.numpy())]
            assert len(set(slots.tolist())) == len(set(rows.tolist())) == len(slots) == len(best)
            torch.testing.assert_close(cost[slots, rows].sum(), best.sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.fault(49)
@pytest.mark.parametrize("counts", [(3, 5), (0, 4), (12, 1), (0, 0)])
def test_pairs_equal_those_of_every_image_alone(counts):
    predictions, labels, boxes = make_case(counts)
    assignment, encoder = HungarianMatcher()(predictions, Targets.pad(labels, boxes))
    assert encoder is None
    for layer in range(3):
        for image, (slots, rows) in enumerate(assignment.pairs(layer)):
            cost = plain_cost(
                predictions.logits[layer, image],
                predictions.boxes[layer, image],
                labels[image],
                boxes[image],
            )
            expected = linear_sum_assignment(cost.numpy())
            assert sorted(zip(slots.tolist(), rows.tolist())) == list(zip(*map(list, expected)))
            # More objects than queries: some stay without.
            assert len(slots) == min(counts[image], 8)


@pytest.mark.parametrize("num_classes", [1, 5])
@pytest.mark.parametrize("counts", [(3, 5), (0, 4), (17, 1), (0, 0), (40, 9)])
@pytest.mark.parametrize("num_tokens", [6, 30, 600])
def test_encoder_tokens_find_the_optimum_too(monkeypatch, counts, num_tokens, num_classes):
    monkeypatch.setattr(matcher, "MANY_QUERIES", 20)
    predictions, labels, boxes = make_case(counts)
    encoder = make_encoder(counts, num_tokens, num_classes)
    decoder_pairs, encoder_pairs = HungarianMatcher()(
        replace(predictions, encoder=encoder), Targets.pad(labels, boxes)
    )
    assert_optimal(decoder_pairs, predictions, labels, boxes)
    assert_optimal(encoder_pairs, encoder, labels, boxes)


@pytest.mark.parametrize("many", [1, 10**9])
def test_ties_do_not_hide_the_optimum(monkeypatch, many):
    """Tokens outside the image all predict the same; objects may be annotated twice."""
    monkeypatch.setattr(matcher, "MANY_QUERIES", many)
    for seed in range(40):
        counts = (seed % 13, 12)
        predictions, labels, boxes = make_case(counts, 2, 40, 1, seed)
        predictions.boxes[:, :, seed:] = 1.0
        predictions.logits[:, :, seed // 2 :] = -3.0
        boxes = [box[torch.arange(len(box)) // 2] for box in boxes]
        assignment, _ = HungarianMatcher()(predictions, Targets.pad(labels, boxes))
        assert_optimal(assignment, predictions, labels, boxes)


def test_candidates_alone_give_the_optimum_of_any_costs():
    """Small integers: nearly all costs tie."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = int(rng.integers(1, 12))
        cost = rng.integers(-3, rng.integers(-1, 6), (count, 40)).astype(np.float32)
        candidates = np.argsort(cost, axis=1, kind="stable")[:, :count].astype(np.int32)
        chosen = np.take_along_axis(cost, candidates, axis=1)
        rows, slots = matcher._solve_candidates(chosen, candidates, 40)
        assert rows.tolist() == list(range(count)) and len(set(slots.tolist())) == count
        assert cost[rows, slots].sum() == cost[linear_sum_assignment(cost)].sum()


def test_cost_in_chunks_equals_the_plain_one(monkeypatch):
    predictions, labels, boxes = make_case((3, 5))
    targets = Targets.pad(labels, boxes)
    cost = HungarianMatcher().cost(predictions, targets.labels, targets.boxes)
    for image, count in enumerate((3, 5)):
        expected = plain_cost(
            predictions.logits[1, image], predictions.boxes[1, image], labels[image], boxes[image]
        )
        torch.testing.assert_close(cost[1, image, :count].T, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(matcher, "MAX_PAIRS", 3 * 2 * 8 * 2 + 1)  # two objects an image at a time
    (chunked,) = HungarianMatcher().candidates(predictions, targets)
    torch.testing.assert_close(chunked, cost)
    monkeypatch.setattr(matcher, "MANY_QUERIES", 1)
    predictions = make_encoder((3, 5), 30)
    values, queries = HungarianMatcher().candidates(predictions, targets)
    cost = HungarianMatcher().cost(predictions, targets.labels, targets.boxes)
    assert values.shape == (1, 2, 5, 5) and queries.dtype == torch.int32
    torch.testing.assert_close(values, cost.sort(-1).values[..., :5])
    torch.testing.assert_close(values, cost.gather(-1, queries.long()))


def on_meta(value):
    """`value` (targets or predictions) without data: whoever reads a number of it fails."""
    moved = {
        name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in vars(value).items()
    }
    return replace(value, **moved)


def test_costs_and_candidates_need_no_number_on_the_host():
    targets = on_meta(Targets.pad(*make_case((10, 3, 7))[1:]))
    for part, shape in (
        (make_case((10, 3, 7))[0], (3, 3, 10, 8)),
        (make_encoder((10, 3, 7), 5000, 1), (1, 3, 10, 10)),
    ):
        assert HungarianMatcher().candidates(on_meta(part), targets)[0].shape == shape


def test_one_hand_over_for_all_and_a_small_one(monkeypatch):
    """All that the solver reads comes from one copy, far smaller than tokens times objects."""
    counts = (10, 3, 7)
    predictions, labels, boxes = make_case(counts, num_layers=2)
    predictions = replace(predictions, encoder=make_encoder(counts, 5000, 1))
    copies, arrays = [], []
    cpu, numpy = torch.Tensor.cpu, torch.Tensor.numpy

    def counted_cpu(self):
        copies.append(self.numel())
        return cpu(self).clone()  # as from an accelerator: memory of its own

    def counted_numpy(self):
        arrays.append(self.untyped_storage().data_ptr())
        return numpy(self)

    monkeypatch.setattr(torch.Tensor, "cpu", counted_cpu)
    monkeypatch.setattr(torch.Tensor, "numpy", counted_numpy)
    HungarianMatcher()(predictions, Targets.pad(labels, boxes))
    monkeypatch.undo()
    decoder = 2 * 3 * 8 * 10
    encoder = 2 * 3 * 10 * 10  # costs and indices
    assert copies == [decoder + encoder]
    assert len(set(arrays)) == 1
    assert encoder < 5000 * sum(counts) / 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saturated_logits_of_half_precision_still_match(monkeypatch, dtype):
    monkeypatch.setattr(matcher, "MANY_QUERIES", 20)
    predictions, labels, boxes = make_case((3, 2))
    encoder = make_encoder((3, 2), 50, 1)
    both = []
    for part in (predictions, encoder):
        half = Predictions((part.logits * 50).to(dtype), part.boxes.to(dtype))
        both.append((half, Predictions(half.logits.float(), half.boxes.float())))
    halves, wides = (replace(decoder, encoder=encoder) for decoder, encoder in zip(*both))
    targets = Targets.pad(labels, boxes)
    for half, wide in both:
        cost = HungarianMatcher().cost(half, targets.labels, targets.boxes)
        assert cost.isfinite().all() and cost.dtype == torch.float32
        assert torch.equal(cost, HungarianMatcher().cost(wide, targets.labels, targets.boxes))
    for narrow, wide in zip(
        HungarianMatcher()(halves, targets), HungarianMatcher()(wides, targets)
    ):
        assert torch.equal(narrow.slots, wide.slots) and torch.equal(narrow.rows, wide.rows)


@pytest.mark.fault(54)
@pytest.mark.parametrize("many", [4, 1000])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["decoder layer 1", "the encoder"])
@pytest.mark.usefixtures("fresh_logs")
def test_what_is_not_finite_is_assigned_and_named(monkeypatch, caplog, many, value, part):
    """So the loss is not finite either, and the trainer stops all processes alike."""
    monkeypatch.setattr(matcher, "MANY_QUERIES", many)
    predictions, labels, boxes = make_case((3, 2), num_queries=50)
    predictions = replace(predictions, encoder=make_encoder((3, 2), 50))
    broken = predictions.encoder if "encoder" in part else predictions
    layer = len(broken.boxes) // 2
    broken.boxes[layer, 1, 44] = value
    match, targets = HungarianMatcher(), Targets.pad(labels, boxes)
    for assignments in (match(predictions, targets), match(predictions, targets)):
        found = assignments[1 if "encoder" in part else 0]
        for image, (slots, rows) in enumerate(found.pairs(layer)):
            assert sorted(rows.tolist()) == list(range((3, 2)[image]))
            assert (44 in slots.tolist()) == (image == 1)
    assert caplog.text.count(f"in {part} a cost of image 1 of the batch is NaN or infinite") == 1
    losses = SetCriterion(match)(predictions, targets)
    name = "enc_loss_bbox" if "encoder" in part else "loss_bbox_1"
    assert [key for key, loss in losses.items() if not loss.isfinite()] == [
        name,
        name.replace("bbox", "giou"),
    ]


@pytest.mark.fault(54)
@pytest.mark.parametrize("many", [4, 1000])
def test_nothing_but_nan_is_assigned_too(monkeypatch, many):
    monkeypatch.setattr(matcher, "MANY_QUERIES", many)
    predictions, labels, boxes = make_case((3, 2, 0), num_queries=50)
    for x in (predictions.logits, predictions.boxes):
        x.fill_(float("nan"))
    match = HungarianMatcher()
    assignment, _ = match(predictions, Targets.pad(labels, boxes))
    assert [len(set(slots.tolist())) for slots, _ in assignment.pairs(2)] == [3, 2, 0]
    losses = SetCriterion(match)(predictions, Targets.pad(labels, boxes))
    assert all(loss.isnan() for loss in losses.values())
