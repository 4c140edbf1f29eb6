"""Query sources: content and anchors of learned and of proposed queries, and of denoising."""

import pytest
import torch

from dn_detr.layers import inverse_sigmoid
from dn_detr.modeling import AnchorQueries, ProposalQueries
from dn_detr.modeling.queries import proposals
from tests.modeling.families import QUERIES, C, D, make_noised, make_tokens


def test_content_and_anchors_of_the_queries():
    source, noised = AnchorQueries(QUERIES, D, C), make_noised((1, 2))
    queries = source(make_tokens(), noised)
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


def test_patterns_repeat_all_anchors_pattern_by_pattern():
    source = AnchorQueries(QUERIES, D, C, num_patterns=3)
    queries = source(make_tokens())
    assert queries.content.shape == (2, 18, D)
    torch.testing.assert_close(queries.anchors[0].view(3, QUERIES, 4)[2], source.anchors.sigmoid())
    unknown = torch.cat([source.label_embed.weight[-1], torch.zeros(1)])
    torch.testing.assert_close(queries.content[1, 2 * QUERIES + 4], source.patterns[2] + unknown)


def test_zero_content_has_no_label_embedding_and_refuses_denoising():
    source = AnchorQueries(QUERIES, D, C, content="zeros", labels=False)
    assert (source(make_tokens()).content == 0).all() and source.label_embed is None
    with pytest.raises(ValueError, match="set model.queries.labels=True"):
        source(make_tokens(), make_noised())


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


@pytest.mark.parametrize("labels", [True, False])
def test_learned_content_leaves_the_indicator_to_denoising(labels):
    source = AnchorQueries(QUERIES, D, C, content="learned", labels=labels)
    content = source(make_tokens(), make_noised() if labels else None).content
    assert source.content.shape == (QUERIES, D - labels)
    matching = content[:, -QUERIES:]
    torch.testing.assert_close(matching[1, :, : D - labels], source.content)
    if labels:
        assert (matching[..., -1] == 0).all() and (content[1, :3, -1] == 1).all()


def test_without_indicator_labels_fill_all_channels():
    source, noised = ProposalQueries(QUERIES, D, C), make_noised((1, 2))
    content = source(make_tokens(), noised).content
    assert source.label_embed.weight.shape == (C + 1, D)
    torch.testing.assert_close(content[1, 1], source.label_embed.weight[noised.labels[1, 1]])
    torch.testing.assert_close(content[0, -QUERIES:], source.content)


def proposals_one_by_one(tokens):
    """Deformable DETR's appendix, cell by cell."""
    expected, start = [], 0
    for image in range(2):
        rows, start = [], 0
        for level, (h, w) in enumerate(tokens.shapes):
            size = h * w
            mask = torch.zeros(size, dtype=torch.bool)
            if tokens.padding_mask is not None:
                mask = tokens.padding_mask[image, start : start + size]
            inside = (~mask).view(h, w)
            height, width = inside[:, 0].sum().item(), inside[0].sum().item()
            for i in range(size):
                x, y = (i % w + 0.5) / width, (i // w + 0.5) / height
                box = (x, y, 0.05 * 2**level, 0.05 * 2**level)
                good = not mask[i] and all(0.01 < number < 0.99 for number in box)
                rows.append(torch.tensor(box).logit() if good else torch.full((4,), torch.inf))
            start += size
        expected.append(torch.stack(rows))
    return torch.stack(expected)


@pytest.mark.parametrize("valid", [None, (2, 4)])
def test_every_token_proposes_a_box_around_itself(valid):
    tokens = make_tokens(((4, 120), (2, 60), (1, 30)), valid)
    logits, usable = proposals(tokens)
    torch.testing.assert_close(logits, proposals_one_by_one(tokens), rtol=1e-5, atol=1e-5)
    assert torch.equal(usable, logits.isfinite().all(-1))
    # 120 cells in a row: the centres of the outermost lie within 0.01 of the border
    assert not usable[0, 0] and usable[0, 2]


@pytest.mark.parametrize("objectness", [False, True])
def test_the_best_tokens_become_anchors_without_gradient(objectness):
    torch.manual_seed(0)
    source = ProposalQueries(QUERIES, D, C, objectness=objectness).eval()
    torch.nn.init.normal_(source.bbox_embed.layers[-1].weight)
    tokens = make_tokens(valid=(2, 4))
    queries = source(tokens)
    logits, usable = proposals(tokens)
    features = source.norm(source.projection(tokens.features * usable[..., None]))
    scores = source.class_embed(features)
    boxes = (source.bbox_embed(features) + logits).sigmoid()
    for image in range(2):
        best = scores[image].amax(-1).argsort(descending=True)[:QUERIES]
        torch.testing.assert_close(queries.anchors[image], boxes[image, best])
        torch.testing.assert_close(queries.proposals.boxes[0, image], boxes[image, best])
        torch.testing.assert_close(queries.proposals.logits[0, image], scores[image, best])
    assert scores.shape[-1] == (1 if objectness else C)
    assert not queries.anchors.requires_grad and queries.proposals.boxes.requires_grad


def test_all_tokens_can_be_supervised_and_anchors_stay_the_same():
    torch.manual_seed(0)
    source, tokens = ProposalQueries(QUERIES, D, C, supervise_all=True), make_tokens()
    training, evaluation = source.train()(tokens), source.eval()(tokens)
    assert training.proposals.boxes.shape == (1, 2, 30, 4)
    assert evaluation.proposals.boxes.shape == (1, 2, QUERIES, 4)
    torch.testing.assert_close(training.anchors, evaluation.anchors)


def test_padding_proposes_the_whole_image_without_gradient():
    source, tokens = ProposalQueries(30, D, C), make_tokens(valid=(2, 4))
    predicted = source(tokens).proposals
    on_padding = (predicted.boxes[0, 1] == 1).all(-1)
    assert on_padding.sum() == tokens.padding_mask[1].sum() > 0
    predicted.boxes.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in source.bbox_embed.parameters())


def test_an_image_of_fewer_tokens_than_queries_has_as_many_queries_as_tokens():
    source, tokens = ProposalQueries(50, D, C), make_tokens()
    queries = source(tokens, make_noised((1, 2)))
    assert queries.content.shape == (2, 4 + 30, D) and queries.anchors.shape == (2, 4 + 30, 4)
    assert queries.attention_mask.shape[-1] == 4 + 30
