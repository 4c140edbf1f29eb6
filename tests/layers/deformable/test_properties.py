"""Any shape at all: `multi_scale_deformable_attention` against loops in float64."""

import pytest
import torch

from dn_detr.layers import multi_scale_deformable_attention
from tests.layers.deformable.cases import (
    DTYPES,
    assert_results,
    random_problem,
    with_gradients,
)

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

side = st.integers(1, 9)
levels = st.lists(st.tuples(side, side, st.integers(0, 5)), min_size=1, max_size=5)


def attend(value, shapes, points, locations, weights):
    return multi_scale_deformable_attention(value, shapes, locations, weights, points)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    levels=levels,
    batch=st.integers(0, 5),
    queries=st.integers(0, 20),
    heads=st.integers(1, 5),
    channels=st.integers(1, 70),
    dtypes=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_equals_the_loops(levels, dtypes, **sizes):
    shapes, points = [level[:2] for level in levels], [level[2] for level in levels]
    problem = random_problem(shapes, points, **sizes).to(*dtypes)
    assert_results(with_gradients(attend, problem), problem)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(levels=levels, channels=st.sampled_from([1, 3, 8, 32]), seed=st.integers(0, 1000))
def test_order_of_points_and_scale_of_weights(levels, **sizes):
    """The result is a sum over points: linear in the weights, and blind to the points' order."""
    shapes = [level[:2] for level in levels]
    value, _, points, locations, weights = random_problem(
        shapes, [3] * len(levels), **sizes
    ).arguments
    expected = attend(value, shapes, points, locations, weights)
    torch.testing.assert_close(
        attend(value, shapes, points, locations, -2 * weights), -2 * expected
    )
    levels = (len(shapes), 3)
    locations = locations.unflatten(3, levels).flip(4).flatten(3, 4)
    weights = weights.unflatten(3, levels).flip(4).flatten(3, 4)
    torch.testing.assert_close(attend(value, shapes, points, locations, weights), expected)
