"""Query source, neck, encoder, decoder, heads: invariants of the whole without a backbone."""

import pytest
import torch

from dn_detr.modeling import (
    DABDecoder,
    DABEncoder,
    DeformableDecoder,
    DeformableEncoder,
    DetectionHeads,
    Tokens,
)
from tests.modeling.families import (
    DEFORMABLE,
    FAMILIES,
    QUERIES,
    SMALL,
    C,
    D,
    Transformer,
    make_inputs,
    make_noised,
    make_tokens,
)

by_family = pytest.mark.parametrize("family", FAMILIES)


@by_family
@pytest.mark.parametrize("mask_unused", [True, False])
@pytest.mark.parametrize("counts", [(2, 3), (0, 3), (0, 0)])
def test_matching_part_never_sees_the_denoising_part(family, mask_unused, counts):
    model, inputs = Transformer(family).eval(), make_inputs()
    noised = make_noised(counts, mask_unused=mask_unused)
    alone, together = model(*inputs), model(*inputs, noised)
    for a, b in ((alone.logits, together.logits), (alone.boxes, together.boxes)):
        torch.testing.assert_close(a, noised.split(b, dim=2)[1], rtol=1e-5, atol=1e-5)


@by_family
def test_groups_do_not_see_each_other(family):
    model, inputs, noised = Transformer(family).eval(), make_inputs(), make_noised()
    before = model(*inputs, noised).logits
    noised.boxes[:, : noised.width] += 0.1  # the first group only
    change = (model(*inputs, noised).logits - before).abs().amax((0, 1, 3))
    assert change[: noised.width].min() > 1e-4
    assert change[noised.width :].max() < 1e-5


def test_hidden_unused_slots_make_outputs_independent_of_the_other_images():
    model, inputs = Transformer().eval(), make_inputs()

    def first_image(counts, mask_unused):
        noised = make_noised(counts, mask_unused=mask_unused)
        # The same two objects whatever the batch: only the number of slots differs.
        known = make_noised((2,), mask_unused=mask_unused)
        for name in ("labels", "boxes"):
            wide = getattr(noised, name).unflatten(1, (2, -1))
            wide[0, :, :2] = getattr(known, name).unflatten(1, (2, -1))[0]
        return model(*inputs, noised).logits.unflatten(2, (-1, 1))[:, 0, :2]

    hidden = [first_image((2, n), mask_unused=True) for n in (2, 5)]
    visible = [first_image((2, n), mask_unused=False) for n in (2, 5)]
    torch.testing.assert_close(*hidden, rtol=1e-5, atol=1e-5)
    assert (visible[0] - visible[1]).abs().max() > 1e-3  # the published wart


def test_padding_changes_nothing_behind_the_backbone():
    model = Transformer().eval()
    features, mask = make_inputs(batch=1)
    wide = {"res5": torch.nn.functional.pad(features["res5"], (0, 3, 0, 2), value=9.0)}
    wide_mask = torch.nn.functional.pad(mask, (0, 48, 0, 32), value=True)
    a, b = model(features, mask), model(wide, wide_mask)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.boxes, b.boxes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["levels", "deformable", "dino", "objectness"])
def test_what_stands_on_padding_is_not_seen(family):
    """Not even by the group norms' neighbours: tokens that are padding may hold anything."""
    model, tokens = Transformer(family).eval(), make_tokens(((8, 12), (4, 6), (2, 3)), (4, 8))
    expected = model.predict(model.encoder(tokens))
    tokens.features[tokens.padding_mask] = 9.0
    tokens.position[tokens.padding_mask] = -3.0
    changed = model.predict(model.encoder(tokens))
    assert tokens.padding_mask.any()
    torch.testing.assert_close(changed.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(changed.boxes, expected.boxes, rtol=1e-5, atol=1e-5)


def test_the_deformable_encoder_sees_an_image_alike_with_and_without_padding():
    model = Transformer("deformable").eval()
    shapes, valid = ((8, 12), (4, 6), (2, 3)), ((4, 8), (2, 4), (1, 2))
    padded = make_tokens(shapes, valid[0])
    inside = ~padded.padding_mask[1]
    alone = Tokens(padded.features[1:, inside], padded.position[1:, inside], None, valid)
    torch.testing.assert_close(padded.centers[1, inside], alone.centers[0])
    a, b = model.encoder(padded).features[1, inside], model.encoder(alone).features[0]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@by_family
def test_batched_equals_single(family):
    model, (features, mask) = Transformer(family).eval(), make_inputs()
    batched = model(features, mask)
    for image in range(2):
        one = {name: feature[image : image + 1] for name, feature in features.items()}
        single = model(one, mask[:1])
        torch.testing.assert_close(
            batched.boxes[:, image], single.boxes[:, 0], rtol=1e-4, atol=1e-5
        )


@by_family
@pytest.mark.parametrize("padded", [False, True])
def test_activation_checkpointing_changes_no_output_and_no_gradient(family, padded):
    features, mask = make_inputs()
    mask[1, 64:] = padded
    results = []
    for switch in (False, True):
        model = Transformer(family, activation_checkpointing=switch).train()
        # The parts really are run again: every layer twice.
        calls = []
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.norm1.register_forward_hook(lambda *args: calls.append(1))
        predictions = model(features, mask, make_noised())
        forward_calls = len(calls)
        (predictions.logits.square().sum() + predictions.boxes.square().sum()).backward()
        results.append((predictions, {n: p.grad for n, p in model.named_parameters()}))
        if family != "objectness":  # its encoder has no switch in this test
            assert len(calls) == (2 if switch else 1) * forward_calls
    (a, expected), (b, gradients) = results
    assert torch.equal(a.logits, b.logits) and torch.equal(a.boxes, b.boxes)
    assert expected.keys() == gradients.keys()
    for name, gradient in expected.items():
        if gradient is not None:
            scale = gradient.abs().max().item()  # sums in another order
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale)
    assert sum(gradient is not None for gradient in gradients.values()) > 20


def test_heads_of_every_layer_start_as_the_shared_one_and_then_differ():
    torch.manual_seed(0)
    shared = DetectionHeads(D, C)
    own = DetectionHeads(D, C, num_layers=3)
    for i in range(3):
        own.class_embed[i].load_state_dict(shared.class_embed.state_dict())
        own.bbox_embed[i].load_state_dict(shared.bbox_embed.state_dict())
    states, anchors = torch.randn(3, 2, QUERIES, D), torch.rand(3, 2, QUERIES, 4)
    a, b = shared(states, anchors), own(states, anchors)
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.boxes, b.boxes)
    torch.nn.init.normal_(own.bbox_embed[1].layers[-1].weight)
    changed = (own(states, anchors).boxes - b.boxes).abs().amax((1, 2, 3)) > 0
    assert changed.tolist() == [False, True, False]
    assert torch.equal(own.refine(1, states[1], anchors[1]), own(states, anchors).boxes[1])


def test_starts_of_the_published_models_are_choices():
    torch.manual_seed(0)
    heads = DetectionHeads(D, C, num_layers=2, size_bias=-2.0)
    biases = [head.layers[-1].bias.tolist() for head in heads.bbox_embed]
    assert biases == [[0, 0, -2, -2], [0, 0, 0, 0]]
    assert DetectionHeads(D, C, zero_boxes=False).bbox_embed.layers[-1].weight.std() > 0.05
    for xavier in (False, True):
        encoder = DeformableEncoder(D, **DEFORMABLE, num_layers=1, xavier_attention=xavier)
        attention = encoder.layers[0].self_attn
        for matrix in (attention.offsets.weight, attention.weights.weight):
            assert (matrix.abs().sum() > 0) == xavier
        assert attention.offsets.bias.abs().max() == 2  # the ring of directions, either way


def test_first_boxes_are_the_anchors():
    model = Transformer()
    model.heads = DetectionHeads(D, C)
    boxes = model(*make_inputs()).boxes
    expected = model.queries.anchors.sigmoid().expand_as(boxes)
    torch.testing.assert_close(boxes, expected, rtol=1e-4, atol=1e-3)
    assert DetectionHeads(D, C)(
        torch.zeros(1, 1, 1, D), torch.rand(1, 1, 1, 4)
    ).logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("family, twice", [("dab", True), ("dino", True), ("deformable", False)])
def test_loss_of_a_layer_trains_at_most_the_refinement_of_the_one_before(family, twice):
    model = Transformer(family)
    states = torch.randn(3, 2, QUERIES, D, requires_grad=True)
    seen = []

    def refine(layer, content, anchors):
        boxes = model.heads.refine(layer, states[layer], anchors)
        seen.append(boxes)
        return boxes

    tokens = model.neck(*make_inputs(), padded=False)
    _, anchors = model.decoder(model.queries(tokens), tokens, refine)
    assert len(seen) == 2 and len(anchors) == 3
    (gradient,) = torch.autograd.grad(anchors[2].sum() + 0 * states.sum(), states)
    assert (gradient[1].abs().sum() > 0) == twice and gradient[0].abs().sum() == 0


@pytest.mark.parametrize("aligned", [0.0, 2.0])
def test_few_layers_leave_no_parameter_without_use(aligned):
    """No encoder layer, one decoder layer: else DDP stops at the second step."""
    model = Transformer()
    model.encoder = DABEncoder(D, **SMALL, num_layers=0)
    model.decoder = DABDecoder(D, **SMALL, num_layers=1, aligned_positions=aligned)
    check_use(model, make_noised())


@by_family
def test_no_parameter_is_without_use(family):
    for noised in (make_noised(), make_noised((0, 0)), None):
        check_use(Transformer(family).train(), noised)


def test_one_deformable_layer_leaves_no_parameter_without_use():
    model = Transformer("deformable")
    model.decoder = DeformableDecoder(D, **DEFORMABLE, num_layers=1)
    model.heads = DetectionHeads(D, C, num_layers=1)
    check_use(model, None)


def check_use(model, noised):
    tokens = model.tokens(*make_inputs())
    queries = model.queries(tokens, noised)
    predictions = model.heads(*model.decoder(queries, tokens, model.heads.refine))
    parts = [predictions] if queries.proposals is None else [predictions, queries.proposals]
    sum(part.logits.sum() + part.boxes.sum() for part in parts).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@by_family
def test_bfloat16_autocast_is_close_to_float32(family):
    model, inputs = Transformer(family).eval(), make_inputs()
    if family in ("dino", "objectness"):  # other tokens would be other queries
        model.queries.select = lambda scores: torch.arange(QUERIES).expand(2, -1) * 20
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*inputs, make_noised())
    full = model(*inputs, make_noised())
    assert low.boxes.dtype == torch.float32 and low.logits.dtype == torch.float32
    assert (low.boxes - full.boxes).abs().max() < 0.05
