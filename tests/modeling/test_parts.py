"""Query source, neck, encoder, decoder, heads: invariants of the whole without a backbone."""

import pytest
import torch

from dn_detr.denoising import DenoisingGenerator
from dn_detr.layers import SinePositionEncoding, Targets, inverse_sigmoid
from dn_detr.modeling import AnchorQueries, DABDecoder, DABEncoder, DetectionHeads, SingleLevelNeck

D, C, QUERIES = 16, 5, 6


class Transformer(torch.nn.Module):
    """Everything between the features and the predictions."""

    def __init__(self, **queries):
        super().__init__()
        torch.manual_seed(0)
        self.neck = SingleLevelNeck("res5", 7, D, SinePositionEncoding(D))
        self.encoder = DABEncoder(D, num_heads=4, feedforward_dim=32, num_layers=2)
        self.queries = AnchorQueries(QUERIES, D, C, **queries)
        self.decoder = DABDecoder(D, num_heads=4, feedforward_dim=32, num_layers=3)
        self.heads = DetectionHeads(D, C)
        # Published initialisation gives equal boxes in all layers, which would hide errors.
        for parameter in self.heads.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, feature, mask, noised=None):
        tokens = self.encoder(self.neck({"res5": feature}, mask, padded=bool(mask.any())))
        queries = self.queries(len(feature), noised)
        return self.heads(*self.decoder(queries, tokens, self.heads.refine))


def make_inputs(batch=2, height=6, width=8):
    g = torch.Generator().manual_seed(1)
    feature = torch.randn(batch, 7, height, width, generator=g)
    return feature, torch.zeros(batch, height * 4, width * 4, dtype=torch.bool)


def make_noised(counts=(2, 3), seed=0, **kwargs):
    torch.manual_seed(seed)
    labels = [torch.randint(0, C, (n,)) for n in counts]
    return DenoisingGenerator(C, groups=2, **kwargs)(
        Targets.pad(labels, [torch.rand(n, 4) * 0.5 + 0.2 for n in counts])
    )


@pytest.mark.parametrize("mask_unused", [True, False])
@pytest.mark.parametrize("counts", [(2, 3), (0, 3), (0, 0)])
def test_matching_part_never_sees_the_denoising_part(mask_unused, counts):
    model, inputs = Transformer().eval(), make_inputs()
    noised = make_noised(counts, mask_unused=mask_unused)
    alone, together = model(*inputs), model(*inputs, noised)
    for a, b in ((alone.logits, together.logits), (alone.boxes, together.boxes)):
        torch.testing.assert_close(a, noised.split(b, dim=2)[1], rtol=1e-5, atol=1e-5)


def test_groups_do_not_see_each_other():
    model, inputs, noised = Transformer().eval(), make_inputs(), make_noised()
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
    feature, mask = make_inputs(batch=1)
    wide = torch.nn.functional.pad(feature, (0, 3, 0, 2), value=9.0)
    wide_mask = torch.nn.functional.pad(mask, (0, 12, 0, 8), value=True)
    a, b = model(feature, mask), model(wide, wide_mask)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.boxes, b.boxes, rtol=1e-4, atol=1e-4)


def test_batched_equals_single():
    model, (feature, mask) = Transformer().eval(), make_inputs()
    batched = model(feature, mask)
    for image in range(2):
        single = model(feature[image : image + 1], mask[:1])
        torch.testing.assert_close(
            batched.boxes[:, image], single.boxes[:, 0], rtol=1e-4, atol=1e-5
        )


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


def test_first_boxes_are_the_anchors():
    model = Transformer()
    model.heads = DetectionHeads(D, C)
    boxes = model(*make_inputs()).boxes
    expected = model.queries.anchors.sigmoid().expand_as(boxes)
    torch.testing.assert_close(boxes, expected, rtol=1e-4, atol=1e-3)
    assert DetectionHeads(D, C)(
        torch.zeros(1, 1, 1, D), torch.rand(1, 1, 1, 4)
    ).logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.05)


def test_loss_of_a_layer_trains_the_refinement_of_the_one_before_and_no_earlier():
    model = Transformer()
    states = torch.randn(3, 2, QUERIES, D, requires_grad=True)
    seen = []

    def refine(layer, content, anchors):
        boxes = model.heads.refine(layer, states[layer], anchors)
        seen.append(boxes)
        return boxes

    tokens = model.neck({"res5": make_inputs()[0]}, make_inputs()[1], padded=False)
    _, anchors = model.decoder(model.queries(2), tokens, refine)
    assert len(seen) == 2 and len(anchors) == 3
    (gradient,) = torch.autograd.grad(anchors[2].sum(), states)
    assert gradient[1].abs().sum() > 0 and gradient[0].abs().sum() == 0


def test_content_and_anchors_of_the_queries():
    source, noised = AnchorQueries(QUERIES, D, C), make_noised((1, 2))
    queries = source(2, noised)
    unknown = source.label_embed.weight[C]
    dn, matching = noised.split(queries.content, dim=1)
    torch.testing.assert_close(matching[..., :-1], unknown.expand(2, QUERIES, -1))
    assert (matching[..., -1] == 0).all()
    assert torch.equal(dn[..., -1], noised.valid.float())
    torch.testing.assert_close(dn[1, 0, :-1], source.label_embed.weight[noised.labels[1, 0]])
    assert (dn[~noised.valid] == 0).all()
    anchors = noised.split(queries.anchors, dim=1)[0]
    assert (anchors[~noised.valid] == 0.5).all()
    torch.testing.assert_close(
        anchors[noised.valid], inverse_sigmoid(noised.boxes[noised.valid]).sigmoid()
    )


@pytest.mark.parametrize("aligned", [0.0, 2.0])
def test_few_layers_leave_no_parameter_without_use(aligned):
    """No encoder layer, one decoder layer: else DDP stops at the second step."""
    model = Transformer()
    model.encoder = DABEncoder(D, num_heads=4, feedforward_dim=32, num_layers=0)
    model.decoder = DABDecoder(
        D, num_heads=4, feedforward_dim=32, num_layers=1, aligned_positions=aligned
    )
    predictions = model(*make_inputs(), make_noised())
    (predictions.logits.sum() + predictions.boxes.sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_patterns_repeat_all_anchors_pattern_by_pattern():
    source = AnchorQueries(QUERIES, D, C, num_patterns=3)
    queries = source(2)
    assert queries.content.shape == (2, 18, D)
    torch.testing.assert_close(queries.anchors[0].view(3, QUERIES, 4)[2], source.anchors.sigmoid())
    unknown = torch.cat([source.label_embed.weight[-1], torch.zeros(1)])
    torch.testing.assert_close(queries.content[1, 2 * QUERIES + 4], source.patterns[2] + unknown)


def test_zero_content_has_no_label_embedding_and_refuses_denoising():
    source = AnchorQueries(QUERIES, D, C, content="zeros")
    assert (source(2).content == 0).all() and source.label_embed is None
    with pytest.raises(ValueError, match="model.queries.content=unknown_label"):
        source(2, make_noised())


@pytest.mark.parametrize("number", [1, 9, 40, 300])
def test_grid_anchors_are_spread_over_the_image(number):
    boxes = AnchorQueries(number, D, C, anchor_init="grid").anchors.sigmoid()
    assert boxes.shape == (number, 4)
    assert boxes[:, :2].unique(dim=0).shape[0] == number
    torch.testing.assert_close(boxes[:, 2:], torch.full((number, 2), 0.3))
    assert (boxes[:, :2] > 0).all() and (boxes[:, :2] < 1).all()


@pytest.mark.parametrize(
    "kwargs, message",
    [(dict(content="label"), "content must be"), (dict(anchor_init="x"), "anchor_init must be")],
)
def test_unknown_choices_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AnchorQueries(QUERIES, D, C, **kwargs)


def test_bfloat16_autocast_is_close_to_float32():
    model, inputs = Transformer().eval(), make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*inputs, make_noised())
    full = model(*inputs, make_noised())
    assert low.boxes.dtype == torch.float32 and low.logits.dtype == torch.float32
    assert (low.boxes - full.boxes).abs().max() < 0.05
