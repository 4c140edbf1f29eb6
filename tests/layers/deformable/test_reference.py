"""The plain PyTorch forms: against loops in float64."""

import pytest
import torch

from dn_detr.layers.deformable import reference
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


def by_sampling_with_its_backward(problem):
    output = reference.by_sampling(*problem.arguments)
    return [output, *reference.by_sampling_backward(problem.gradient, *problem.arguments)]


FORMS = {
    "by_sampling": lambda problem: with_gradients(reference.by_sampling, problem),
    "by_sampling_backward": by_sampling_with_its_backward,
    "by_gathering": lambda problem: with_gradients(reference.by_gathering, problem),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@pytest.mark.fault(66)
@forms
@pytest.mark.parametrize("sizes", GRID.values(), ids=GRID.keys())
def test_equals_the_loops(form, sizes):
    problem = random_problem(**sizes)
    assert_results(form(problem), problem)


@forms
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(dtype_name, pair)))
def test_equals_the_loops_in_every_dtype(form, dtypes):
    problem = random_problem(channels=8).to(*dtypes)
    assert_results(form(problem), problem)


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
def test_equals_the_loops_on_borders_and_far_away(form, dtype):
    problem = border_problem().to(dtype)
    assert_results(form(problem), problem)


@forms
def test_a_nan_pixel_stays_out_of_what_does_not_touch_it(form):
    problem = with_nan_pixels(border_problem()).to(torch.float32)
    output = form(problem)[0]
    assert 0 < output.isnan().sum() < output.numel() / 2
    assert_results(form(problem), problem)


@forms
def test_a_nan_location_makes_its_result_nan(form):
    problem = nan_location_problem()
    assert_nan_location(form(problem), problem)


def test_gathering_can_be_differentiated_any_number_of_times():
    problem = smooth_problem(batch=1, queries=1, heads=1, channels=2)
    leaves = [x.requires_grad_() for x in (problem.value, problem.locations, problem.weights)]

    def second_derivatives(value, locations, weights):
        arguments = (value, problem.shapes, problem.points, locations, weights)
        output = reference.by_gathering(*arguments)
        first = torch.autograd.grad(output, leaves[1], problem.gradient, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), leaves[1], create_graph=True)

    assert torch.autograd.gradgradcheck(
        lambda *x: reference.by_gathering(x[0], problem.shapes, problem.points, *x[1:]), leaves
    )
    assert torch.autograd.gradcheck(second_derivatives, leaves)
