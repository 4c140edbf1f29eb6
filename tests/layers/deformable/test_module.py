"""`MultiScaleDeformableAttention`: against loops, and projections and locations in float64."""

import copy
import math

import numpy as np
import pytest
import torch

from dn_detr.layers import MultiScaleDeformableAttention, project_values
from tests.layers.deformable import loops

B, Q, D, H = 2, 5, 16, 4
SHAPES = [(6, 4), (3, 5), (2, 1)]
S = 41
MODES = {
    "projections": dict(num_points=2),
    "points as in D-FINE": dict(num_points=(3, 6, 3), projections=False),
    "a level without points": dict(num_points=(3, 0, 1)),
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
references = pytest.mark.parametrize("levels", [1, 3])
coordinates = pytest.mark.parametrize("coordinates", [2, 4])


def make_attention(seed=0, **mode):
    """With random parameters; offsets of some pixels."""
    torch.manual_seed(seed)
    attention = MultiScaleDeformableAttention(D, H, len(SHAPES), **mode)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention


def make_inputs(levels=1, coordinates=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    query, tokens = (torch.randn(B, n, D, generator=generator) for n in (Q, S))
    return query, tokens, torch.rand(B, Q, levels, coordinates, generator=generator)


def some_padding():
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, 3:24:4] = mask[0, 24:31] = mask[1, -2:] = True
    return mask


def apply(linear, x):
    if linear is None:
        return x
    weight, bias = (p.detach().double().numpy() for p in (linear.weight, linear.bias))
    return x @ weight.T + bias


def expected_output(attention, query, tokens, points, padding_mask=None):
    """In float64, one point after the other."""
    query, tokens, points = (x.detach().double().numpy() for x in (query, tokens, points))
    value = apply(attention.value, tokens).reshape(B, S, H, D // H)
    if padding_mask is not None:
        value = np.where(padding_mask.numpy()[:, :, None, None], 0, value)
    numbers = attention.points_per_level
    offsets = apply(attention.offsets, query).reshape(B, Q, H, sum(numbers), 2)
    weights = np.exp(apply(attention.weights, query).reshape(B, Q, H, sum(numbers)))
    weights /= weights.sum(-1, keepdims=True)
    locations = np.empty_like(offsets)
    point = 0
    for level, ((height, width), number) in enumerate(zip(SHAPES, numbers)):
        start = points[:, :, level if points.shape[2] > 1 else 0]
        for _ in range(number):
            for head in range(H):
                offset = offsets[:, :, head, point]
                if points.shape[-1] == 2:
                    offset = offset / [width, height]
                else:
                    offset = offset / number * start[..., 2:] * 0.5
                locations[:, :, head, point] = start[..., :2] + offset
            point += 1
    return torch.from_numpy(
        apply(attention.output, loops.forward(value, SHAPES, numbers, locations, weights))
    )


@modes
@references
@coordinates
@pytest.mark.parametrize("padding_mask", [None, some_padding()], ids=["full", "padded"])
def test_follows_the_equations(mode, levels, coordinates, padding_mask):
    attention = make_attention(**mode)
    query, tokens, points = make_inputs(levels, coordinates)
    actual = attention(query, tokens, SHAPES, points, padding_mask)
    expected = expected_output(attention, query, tokens, points, padding_mask)
    assert actual.shape == (B, Q, D) and actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads, points", [(8, 4), (4, (3, 6, 3)), (6, (1, 2, 0))], ids=str)
def test_starts_as_published(heads, points):
    """Offsets from the formula; in D-FINE, each level's points begin at one pixel again."""
    attention = MultiScaleDeformableAttention(24, heads, 3, points)
    numbers = attention.points_per_level
    bias = attention.offsets.bias.view(heads, sum(numbers), 2).tolist()
    for head in range(heads):
        angle = 2 * math.pi * head / heads
        longer = max(abs(math.cos(angle)), abs(math.sin(angle)))
        steps = [step for number in numbers for step in range(1, number + 1)]
        for offset, step in zip(bias[head], steps, strict=True):
            x, y = step * math.cos(angle) / longer, step * math.sin(angle) / longer
            assert offset == pytest.approx([x, y], abs=1e-5)
    assert not attention.offsets.weight.any()
    assert not attention.weights.weight.any() and not attention.weights.bias.any()
    for linear in (attention.value, attention.output):
        assert not linear.bias.any()
        assert 0.9 < linear.weight.abs().max() / math.sqrt(6 / 48) <= 1  # Xavier uniform


def test_reset_parameters_returns_to_the_start():
    attention = MultiScaleDeformableAttention(D, H, 3, (3, 6, 3))
    start = copy.deepcopy(attention.state_dict())
    for parameter in attention.parameters():
        torch.nn.init.ones_(parameter)
    attention.reset_parameters()
    for name in ("offsets.weight", "offsets.bias", "weights.weight", "weights.bias"):
        assert torch.equal(attention.state_dict()[name], start[name])


def test_parameters_fit_published_checkpoints():
    """Names differ, shapes are those of Deformable DETR's module, and of D-FINE-L's."""
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in MultiScaleDeformableAttention(256).named_parameters()
    }
    assert shapes == {
        "value.weight": (256, 256),
        "value.bias": (256,),
        "offsets.weight": (256, 256),
        "offsets.bias": (256,),
        "weights.weight": (128, 256),
        "weights.bias": (128,),
        "output.weight": (256, 256),
        "output.bias": (256,),
    }
    dfine = MultiScaleDeformableAttention(256, 8, 3, (3, 6, 3), projections=False).state_dict()
    assert {name: tuple(x.shape) for name, x in dfine.items()} == {
        "offsets.weight": (192, 256),
        "offsets.bias": (192,),
        "weights.weight": (96, 256),
        "weights.bias": (96,),
    }


@modes
def test_padding_has_no_influence(mode):
    attention = make_attention(**mode)
    query, tokens, points = make_inputs()
    mask = some_padding()
    broken = tokens.masked_fill(mask[..., None], torch.nan).requires_grad_()
    actual = attention(query, broken, SHAPES, points, mask)
    assert torch.equal(actual, attention(query, tokens, SHAPES, points, mask))
    if attention.value is None:  # a NaN input makes NaN of the gradient of a projection's weight
        actual.sum().backward()
        assert not broken.grad[mask].any() and broken.grad[~mask].any()


def test_a_mask_without_padding_changes_nothing_and_inputs_stay_as_they_are():
    for mode in MODES.values():
        attention = make_attention(**mode)
        query, tokens, points = make_inputs()
        before = tokens.clone()
        masked = attention(query, tokens, SHAPES, points, some_padding())
        assert torch.equal(tokens, before)
        none = attention(query, tokens, SHAPES, points, torch.zeros(B, S, dtype=torch.bool))
        assert torch.equal(none, attention(query, tokens, SHAPES, points))
        assert not torch.equal(none, masked)


def test_a_batch_is_its_images():
    attention = make_attention(num_points=2)
    query, tokens, points = make_inputs(3, 4)
    together = attention(query, tokens, SHAPES, points, some_padding())
    for i in range(B):
        one = slice(i, i + 1)
        alone = attention(query[one], tokens[one], SHAPES, points[one], some_padding()[one])
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("padding_mask", [None, some_padding()], ids=["full", "padded"])
def test_values_of_several_layers_are_one_product(padding_mask):
    """Results and gradients are those of the layers' own projections; nothing is copied."""
    layers = [make_attention(seed, num_points=2) for seed in range(3)]
    query, tokens, points = make_inputs(coordinates=4)
    separate = copy.deepcopy(layers)
    ours, theirs = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    values = project_values(ours, layers, padding_mask)
    assert [value.shape for value in values] == [(B, S, H, D // H)] * 3
    assert len({value.untyped_storage().data_ptr() for value in values}) == 1
    for layer, other, value in zip(layers, separate, values):
        actual = layer(query, value, SHAPES, points)
        expected = other(query, theirs, SHAPES, points, padding_mask)
        torch.testing.assert_close(actual, expected)
        actual.square().sum().backward(retain_graph=True)
        expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for layer, other in zip(layers, separate):
        for (name, a), b in zip(layer.named_parameters(), other.parameters()):
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name} {text}")


def test_values_of_layers_without_projections_are_the_tokens():
    layers = [make_attention(num_points=1, projections=False)] * 2
    _, tokens, _ = make_inputs()
    first, second = project_values(tokens, layers)
    assert first.data_ptr() == second.data_ptr() == tokens.data_ptr()
    first, second = project_values(tokens, layers, some_padding())
    assert first.data_ptr() == second.data_ptr() != tokens.data_ptr()


@modes
@coordinates
def test_gradients(mode, coordinates):
    """Of everything, by finite differences. Points in the middle between pixels' centres."""
    torch.manual_seed(0)
    attention = MultiScaleDeformableAttention(8, 2, len(SHAPES), **mode).double()
    with torch.no_grad():
        attention.offsets.weight.normal_(std=0.01)
        attention.offsets.bias.normal_(std=0.1)
    query, tokens = (torch.randn(1, n, 8, dtype=torch.float64).requires_grad_() for n in (2, S))
    points = torch.full((1, 2, 1, coordinates), 0.45, dtype=torch.float64).requires_grad_()

    def function(query, tokens, points, *parameters):
        named = dict(zip(dict(attention.named_parameters()), parameters))
        arguments = (query, tokens, SHAPES, points, some_padding()[:1])
        return torch.func.functional_call(attention, named, arguments)

    leaves = (query, tokens, points, *attention.parameters())
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_locations_exact(mode, dtype):
    """On a map of 400 columns, bfloat16 would round a point to the wrong pixel."""
    shapes = [(2, 400), (1, 100), (1, 1)]
    attention = MultiScaleDeformableAttention(D, H, 3, **mode)
    torch.nn.init.zeros_(attention.offsets.bias)
    tokens = torch.randn(B, 901, D, generator=torch.Generator().manual_seed(0))
    query = make_inputs()[0].requires_grad_()
    points = torch.tensor([371.5 / 400, 0.25]).expand(B, Q, 1, 2)  # the centre of column 371
    expected = attention(query, tokens, shapes, points)
    with torch.autocast("cpu", dtype):
        actual = attention(query, tokens, shapes, points)
        (value,) = project_values(tokens, [attention])
        shared = attention(query, value, shapes, points)
    assert actual.dtype == dtype and torch.equal(actual, shared)
    assert value.dtype == (torch.float32 if attention.value is None else dtype)
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
    actual.float().sum().backward()
    assert query.grad.dtype == attention.offsets.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_runs_in_low_precision_throughout(dtype):
    attention = make_attention(num_points=2)
    query, tokens, points = make_inputs()
    expected = attention(query, tokens, SHAPES, points)
    attention = attention.to(dtype)
    actual = attention(query.to(dtype), tokens.to(dtype), SHAPES, points)
    assert actual.dtype == dtype
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max()


@coordinates
@references
def test_compiled_equals_eager(coordinates, levels):
    torch.compiler.reset()
    attention = make_attention(num_points=(2, 0, 3))
    query, tokens, points = make_inputs(levels, coordinates)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attention, compiled):
        leaves = [x.clone().requires_grad_() for x in (query, tokens, points)]
        output = function(*leaves[:2], SHAPES, leaves[2], some_padding())
        parameters = [*leaves, *attention.parameters()]
        results.append([output, *torch.autograd.grad(output.square().sum(), parameters)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_other_level_sizes_do_not_compile_again():
    torch.compiler.reset()
    attention = MultiScaleDeformableAttention(D, H, 2)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="eager")
    for side in (5, 6, 9):
        shapes, batch, queries = [(side, side + 1), (7, side + 7)], side + 20, side + 9
        tokens = torch.randn(batch, side * (side + 1) + 7 * (side + 7), D)
        query, points = torch.randn(batch, queries, D), torch.rand(batch, queries, 1, 2)
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = compiled(query, tokens, shapes, points)
        torch.testing.assert_close(actual, attention(query, tokens, shapes, points))


@coordinates
@references
def test_no_tensor_is_made_on_another_device(coordinates, levels):
    """Which would have to be copied, and waited for."""
    attention = make_attention(num_points=(2, 0, 3)).to("meta")
    query, tokens, points, mask = (
        x.to("meta") for x in (*make_inputs(levels, coordinates), some_padding())
    )
    output = attention(query, tokens, SHAPES, points, mask)
    assert output.is_meta and output.shape == (B, Q, D)


def test_exports_with_any_batch_and_number_of_queries():
    attention = make_attention(num_points=2).eval()
    query, tokens, points = make_inputs(coordinates=4)
    batch, queries = torch.export.Dim("batch"), torch.export.Dim("queries")
    dynamic = {0: batch, 1: queries}
    program = torch.export.export(
        attention,
        (query, tokens, SHAPES, points),
        dynamic_shapes=(dynamic, {0: batch}, [(None, None)] * len(SHAPES), dynamic),
    )
    query, tokens, points = (torch.cat([x, x + 0.1, x]) for x in (query, tokens, points))
    query, points = (torch.cat([x, x], 1) for x in (query, points))
    expected = attention(query, tokens, SHAPES, points)
    torch.testing.assert_close(program.module()(query, tokens, SHAPES, points), expected)


BAD = [  # changed arguments, error, how its text begins
    ({"query": torch.zeros(B, Q, 3)}, ValueError, "query: [B, Q, 16] is needed, got [2, 5, 3]"),
    ({"query": torch.zeros(Q, D)}, ValueError, "query: [B, Q, 16] is needed, got [5, 16]"),
    ({"value": torch.zeros(B, S, 3)}, ValueError, "value: [B, S, 16] is needed, got [2, 41, 3]"),
    ({"value": torch.zeros(S, D)}, ValueError, "value: [B, S, 16], or projected [B, S, 4, 4] is "),
    ({"value": torch.zeros(B, S, 2, 8)}, ValueError, "value: [B, S, 16], or projected [B, S, 4, 4"),
    ({"value": torch.zeros(1, S, D)}, ValueError, "value: batch 2 is needed as of query, got 1"),
    ({"shapes": SHAPES[:2]}, ValueError, "shapes: [(6, 4), (3, 5)] add up to 39 tokens, but value"),
    (
        {"shapes": [(6, 4), (3, 5), (1, 1), (1, 1)]},
        ValueError,
        "shapes: 3 levels are needed, got 4",
    ),
    ({"shapes": torch.tensor(SHAPES)}, TypeError, "shapes: a sequence of (height, width) is neede"),
    ({"reference_points": torch.zeros(B, Q, 1, 3)}, ValueError, "reference_points: [2, 5, 3 or 1,"),
    ({"reference_points": torch.zeros(B, Q, 2, 2)}, ValueError, "reference_points: [2, 5, 3 or 1,"),
    ({"reference_points": torch.zeros(B, Q, 2)}, ValueError, "reference_points: [2, 5, 3 or 1, 2 "),
    ({"reference_points": torch.zeros(1, Q, 1, 2)}, ValueError, "reference_points: [2, 5, 3 or 1,"),
    ({"padding_mask": torch.zeros(B, S)}, TypeError, "padding_mask: bool is needed, got torch.flo"),
    (
        {"padding_mask": some_padding()[:, 1:]},
        ValueError,
        "padding_mask: [2, 41] is needed, got [2",
    ),
    (
        {"padding_mask": some_padding(), "value": torch.zeros(B, S, H, D // H)},
        ValueError,
        "padding_mask: give it to project_values, which made this value",
    ),
]


@pytest.mark.parametrize("changed, error, text", BAD, ids=range(len(BAD)))
def test_an_error_names_its_argument(changed, error, text):
    query, tokens, points = make_inputs()
    good = {"query": query, "value": tokens, "shapes": SHAPES, "reference_points": points}
    attention = make_attention(num_points=2)
    attention(**good)
    with pytest.raises(error) as raised:
        attention(**good | changed)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (
            dict(embed_dim=10, num_heads=4),
            "num_heads: it must divide embed_dim, got 4 heads for 10",
        ),
        (
            dict(embed_dim=10, num_heads=0),
            "num_heads: it must divide embed_dim, got 0 heads for 10",
        ),
        (
            dict(embed_dim=8, num_points=(3, 6, 3)),
            "num_points: one number, or one for each of 4 le",
        ),
        (
            dict(embed_dim=8, num_levels=2, num_points=(3, -1)),
            "num_points: one number, or one for ",
        ),
        (
            dict(embed_dim=8, num_points=0),
            "num_points: one number, or one for each of 4 levels, an",
        ),
        (
            dict(embed_dim=8, num_levels=0),
            "num_points: one number, or one for each of 0 levels, an",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(arguments, text):
    with pytest.raises(ValueError) as raised:
        MultiScaleDeformableAttention(**arguments)
    assert str(raised.value).startswith(text)


def test_layers_with_and_without_projections_share_no_product():
    layers = [make_attention(num_points=1, projections=x) for x in (True, False)]
    with pytest.raises(ValueError, match="^layers: all must project their values, or none"):
        project_values(make_inputs()[1], layers)


def test_says_what_it_is():
    text = repr(MultiScaleDeformableAttention(D, H, 3, (3, 6, 3), projections=False))
    assert "num_heads=4, points_per_level=(3, 6, 3)" in text
