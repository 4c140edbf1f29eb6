"""`multi_scale_deformable_attention`: its results, whoever computes them, and its errors."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from dn_detr.layers import multi_scale_deformable_attention
from tests.layers.deformable.cases import (
    DTYPES,
    GRID,
    assert_nan_location,
    assert_results,
    border_problem,
    dtype_name,
    nan_location_problem,
    random_problem,
    smooth_problem,
    with_gradients,
    with_nan_pixels,
)


def attend(value, shapes, points, locations, weights):
    return multi_scale_deformable_attention(value, shapes, locations, weights, points)


@pytest.mark.fault(66)
@pytest.mark.parametrize("sizes", GRID.values(), ids=GRID.keys())
def test_equals_the_loops(sizes):
    """Batches that no block divides, no batch, no queries: each an error or wrong elsewhere."""
    problem = random_problem(**sizes)
    assert_results(with_gradients(attend, problem), problem)


@pytest.mark.fault(66)
@pytest.mark.parametrize("channels", [4, 7, 32, 40])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
def test_equals_the_loops_in_every_dtype(dtypes, channels):
    """Also the bfloat16 backward, which FlashDeformAttn cannot run."""
    problem = random_problem(channels=channels).to(*dtypes)
    assert_results(with_gradients(attend, problem), problem)


@pytest.mark.fault(66)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
@pytest.mark.parametrize("channels", [3, 32])
def test_equals_the_loops_on_borders_and_far_away(dtypes, channels):
    """FlashDeformAttn leaves gradients of points outside unwritten; here they are exactly zero."""
    problem = border_problem(channels=channels).to(*dtypes)
    results = with_gradients(attend, problem)
    assert_results(results, problem)
    far = (problem.locations.abs() > 1e3).any(-1)
    assert far.any() and not results[2][far].any() and not results[3][far].any()


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
@pytest.mark.parametrize("channels", [3, 32])
def test_a_nan_pixel_stays_out_of_what_does_not_touch_it(dtypes, channels):
    """A kernel that clamps outside corners and gives them no weight would make NaN of them."""
    problem = with_nan_pixels(border_problem(channels=channels)).to(*dtypes)
    results = with_gradients(attend, problem)
    assert 0 < results[0].isnan().sum() < results[0].numel() / 2
    assert_results(results, problem)


@pytest.mark.parametrize("channels", [3, 32])
def test_a_nan_location_makes_its_result_nan(channels):
    problem = nan_location_problem(channels)
    assert_nan_location(with_gradients(attend, problem), problem)


@pytest.mark.parametrize("batch, queries", [(4, 300), (16, 85), (3, 7)])
def test_every_image_is_read_for_itself(batch, queries):
    """FlashDeformAttn's blocks that straddle two images read the first image's values only."""
    problem = random_problem(batch=batch, queries=queries).to(torch.float32)
    together = with_gradients(attend, problem)
    for image in range(batch):
        alone = replace(
            problem,
            **{
                name: getattr(problem, name)[image : image + 1]
                for name in ("value", "locations", "weights", "gradient")
            },
        )
        for a, b in zip(together, with_gradients(attend, alone)):
            torch.testing.assert_close(a[image : image + 1], b)


LAYOUTS = {
    "one layer of a joint product": lambda x: torch.stack([x + 1, x, x + 2], 2).unbind(2)[1],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last axis first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "with an offset": lambda x: torch.cat([x[:1], x], 0)[1:],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded heads": lambda x: x[:, :, :1].expand(x.shape),
}


@pytest.mark.fault(66)
@pytest.mark.parametrize("tensor", ["value", "locations", "weights", "gradient"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_in_memory_change_nothing(layout, tensor):
    """The well-known kernel refuses what is not contiguous."""
    problem = random_problem(channels=8).to(torch.float32)
    strided = replace(problem, **{tensor: layout(getattr(problem, tensor))})
    assert_results(with_gradients(attend, strided), strided)


def test_points_may_have_one_axis_or_two():
    problem = random_problem(points=(3, 3)).to(torch.float32)
    value, shapes, _, locations, weights = problem.arguments
    two = multi_scale_deformable_attention(
        value, shapes, locations.unflatten(3, (2, 3)), weights.unflatten(3, (2, 3))
    )
    assert torch.equal(two, attend(*problem.arguments))


def smooth_leaves(problem):
    return [x.requires_grad_() for x in (problem.value, problem.locations, problem.weights)]


@pytest.mark.fault(66)
def test_first_and_second_derivatives():
    problem = smooth_problem(batch=1, queries=2, heads=2, channels=2)
    leaves = smooth_leaves(problem)

    def function(value, locations, weights):
        return attend(value, problem.shapes, problem.points, locations, weights)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_third_derivatives():
    """Of arguments that depend on each other, and of a loss that is not linear in the output."""
    problem = smooth_problem(batch=1, queries=1, heads=1, channels=2)

    def second(value, locations, weights):
        mixed = value * weights.sum(), locations + 1e-3 * value.sum(), weights * value.mean()
        loss = attend(mixed[0], problem.shapes, problem.points, *mixed[1:]).sin().sum()
        leaves = value, locations, weights
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        loss = sum(x.square().sum() for x in first)
        return torch.autograd.grad(loss, leaves, create_graph=True)

    assert torch.autograd.gradcheck(second, smooth_leaves(problem), atol=1e-4)


def test_only_what_asks_for_a_gradient_gets_one():
    problem = random_problem()
    weights = problem.weights.requires_grad_()
    attend(*problem.arguments).sum().backward()
    assert problem.value.grad is None and problem.locations.grad is None
    assert weights.grad is not None


V, L, W = torch.zeros(2, 10, 4, 8), torch.zeros(2, 3, 4, 2, 5, 2), torch.zeros(2, 3, 4, 2, 5)
GOOD = {"value": V, "shapes": [(2, 3), (2, 2)], "locations": L, "weights": W}
FLAT = {"locations": L.flatten(3, 4), "weights": W.flatten(3, 4)}
BAD = [  # changed arguments, error, how its text begins
    ({"value": V.numpy()}, TypeError, "value: a tensor is needed, got ndarray"),
    ({"value": V[0]}, ValueError, "value: [B, S, H, D] is needed, got 3 dimensions"),
    ({"value": V.long()}, TypeError, "value: float32, float64, float16 or bfloat16 needed, got"),
    ({"value": V.double()}, TypeError, "locations: torch.float64 is needed beside torch.float64"),
    (
        {"value": V.half(), "locations": L.half(), "weights": W.half()},
        TypeError,
        "locations: torch.float32 is needed beside torch.float16 values, got torch.float16: in low "
        "precision, points would be misplaced by up to a pixel",
    ),
    ({"locations": L.bfloat16()}, TypeError, "locations: torch.float32 is needed beside"),
    ({"locations": None}, TypeError, "locations: a tensor is needed, got NoneType"),
    (
        {"locations": L.to("meta")},
        ValueError,
        "locations: all tensors must be on one device; it is ",
    ),
    (
        {"locations": L[0, 0, 0, 0, 0]},
        ValueError,
        "locations: [B, Q, H, L, P, 2] is needed, got fe",
    ),
    (
        {"locations": L.flatten(3, 4)},
        ValueError,
        "locations: [B, Q, H, L, P, 2] is needed (or poin",
    ),
    (
        {"locations": L[..., :1]},
        ValueError,
        "locations: [2, 3, 4, 2, 5, 2] is needed beside the ot",
    ),
    (
        {"locations": L[:1]},
        ValueError,
        "locations: [2, 3, 4, 2, 5, 2] is needed beside the other a",
    ),
    ({"locations": L[:, :, :, :1]}, ValueError, "locations: [2, 3, 4, 2, 5, 2] is needed beside "),
    ({"locations": L[:, :, :2]}, ValueError, "locations: [2, 3, 4, 2, 5, 2] is needed beside the "),
    (
        {"weights": W[:, :2]},
        ValueError,
        "weights: [2, 3, 4, 2, 5] is needed beside the other argum",
    ),
    (
        {"weights": W.to("meta")},
        ValueError,
        "weights: all tensors must be on one device; it is on ",
    ),
    (
        {"weights": W.half()},
        TypeError,
        "weights: torch.float32 is needed beside torch.float32 valu",
    ),
    (
        {"value": V.half(), "weights": W.bfloat16()},
        TypeError,
        "weights: torch.float16 or torch.float32 is needed beside torch.float16 values, got",
    ),
    (
        {"shapes": torch.tensor([(2, 3), (2, 2)])},
        TypeError,
        "shapes: a sequence of (height, width)",
    ),
    (
        {"shapes": [torch.tensor([2, 3])] * 2},
        TypeError,
        "shapes: a sequence of (height, width) is ",
    ),
    ({"shapes": [(2.0, 3), (2, 2)]}, TypeError, "shapes: a sequence of (height, width) is needed,"),
    ({"shapes": [2, 3, 2, 2]}, TypeError, "shapes: a sequence of (height, width) is needed, such"),
    ({"shapes": [(2, 3, 1)]}, TypeError, "shapes: a sequence of (height, width) is needed, such a"),
    ({"shapes": None}, TypeError, "shapes: a sequence of (height, width) is needed, such as [(100"),
    ({"shapes": []}, ValueError, "shapes: at least one level, and no side below 1, got []"),
    ({"shapes": [(-2, -3), (2, 2)]}, ValueError, "shapes: at least one level, and no side below 1"),
    ({"shapes": [(0, 3), (5, 2)]}, ValueError, "shapes: at least one level, and no side below 1, "),
    (
        {"shapes": [(2, 3), (2, 3)]},
        ValueError,
        "shapes: [(2, 3), (2, 3)] add up to 12 tokens, but ",
    ),
    ({"shapes": [(2, 5)]}, ValueError, "locations: [2, 3, 4, 1, 5, 2] is needed beside the other "),
    (
        {**FLAT, "points_per_level": [10]},
        ValueError,
        "points_per_level: a number for each of the 2",
    ),
    ({**FLAT, "points_per_level": [12, -2]}, ValueError, "points_per_level: a number for each of"),
    (
        {**FLAT, "points_per_level": [5.0, 5]},
        TypeError,
        "points_per_level: integers are needed, go",
    ),
    ({**FLAT, "points_per_level": 5}, TypeError, "points_per_level: integers are needed, got 5"),
    (
        {**FLAT, "points_per_level": [6, 5]},
        ValueError,
        "locations: [2, 3, 4, 11, 2] is needed besi",
    ),
    ({"points_per_level": [5, 5]}, ValueError, "locations: [2, 3, 4, 10, 2] is needed beside the "),
]


@pytest.mark.fault(66)
@pytest.mark.parametrize("changed, error, text", BAD, ids=range(len(BAD)))
def test_an_error_names_its_argument(changed, error, text):
    """Also wrong level sizes, which the well-known kernel takes for granted, and reads beyond."""
    multi_scale_deformable_attention(**GOOD)
    with pytest.raises(error) as raised:
        multi_scale_deformable_attention(**GOOD | changed)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize("changed, error, text", BAD, ids=range(len(BAD)))
def test_checks_look_at_metadata_only(changed, error, text):
    """Fake tensors have no data: a check that read any, and so waited for a device, would fail."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def fake(argument):
            return mode.from_tensor(argument) if isinstance(argument, torch.Tensor) else argument

        arguments = {name: fake(argument) for name, argument in GOOD.items()}
        assert multi_scale_deformable_attention(**arguments).shape == (2, 3, 32)
        arguments |= torch.utils._pytree.tree_map(fake, changed)
        with pytest.raises(error) as raised:
            multi_scale_deformable_attention(**arguments)
    assert str(raised.value).startswith(text)


def test_tensors_without_data_pass_through_with_gradients():
    value, locations, weights = (x.to("meta").requires_grad_() for x in (V, L, W))
    output = multi_scale_deformable_attention(value, GOOD["shapes"], locations, weights)
    assert output.shape == (2, 3, 32) and output.is_meta
    output.sum().backward()
    assert [x.grad.shape for x in (value, locations, weights)] == [V.shape, L.shape, W.shape]


@pytest.mark.large
def test_a_map_of_more_than_2_to_the_31_elements():
    """32-bit indices of B * S * H * D overflow. 14 GB: gradients of value, float32 and bfloat16.

    Pages of `value` that nobody writes take no memory.
    """
    height, width, channels = 2**16 + 1, 2**7, 256
    value = torch.empty(1, height * width, 1, channels, dtype=torch.bfloat16)
    assert value.numel() > 2**31
    value[0, -1] = 3  # the last pixel, beyond the reach of 32 bits
    location = torch.tensor([1 - 0.5 / width, 1 - 0.5 / height]).view(1, 1, 1, 1, 1, 2)
    weight = torch.ones(1, 1, 1, 1, 1)
    for tensor in (value, location, weight):
        tensor.requires_grad_()
    output = multi_scale_deformable_attention(value, [(height, width)], location, weight)
    torch.testing.assert_close(output, torch.full_like(output, 3), rtol=0.02, atol=0)
    output.sum().backward()
    assert value.grad[0, -1, 0].float().sum().item() == pytest.approx(channels, rel=0.02)
    assert weight.grad.item() == pytest.approx(3 * channels, rel=0.02)


@pytest.mark.large
def test_more_than_2_to_the_31_coordinates():
    """32-bit indices of B * Q * H * N * 2 overflow. 13 GB, all of it gradients."""
    queries, points, channels = 2**20 + 1, 2**10, 8
    value = torch.tensor([2.0, 5.0]).view(1, 2, 1, 1).repeat(1, 1, 1, channels).requires_grad_()
    locations = torch.empty(1, queries, 1, 1, points, 2)  # zeros: pages that nobody writes
    weights = torch.empty(1, queries, 1, 1, points)
    assert locations.numel() > 2**31
    locations[0, -1, 0, 0, -1] = torch.tensor([0.75, 0.5])  # the centre of the second pixel
    weights[0, -1, 0, 0, -1] = 1
    for tensor in (locations, weights):
        tensor.requires_grad_()
    output = multi_scale_deformable_attention(value, [(1, 2)], locations, weights)
    assert (output[0, -1] == 5).all() and not output[0, :-1].any()
    output[0, -1].sum().backward()
    assert (value.grad[0, :, 0] == torch.tensor([[0.0], [1.0]])).all()
    assert weights.grad[0, -1, 0, 0, -1].item() == 5 * channels
