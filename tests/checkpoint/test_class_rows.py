import pytest
import torch

from dn_detr.checkpoint.class_rows import count_classes, move_rows, take_rows


def two_stage(num_classes, proposed, start=0):
    """Class rows of a two-stage model, every number of which is its row's."""

    def rows(number):
        return torch.arange(start, start + number).float()[:, None].expand(-1, 2).clone()

    return {
        "queries.class_embed.weight": rows(proposed),
        "queries.class_embed.bias": rows(proposed)[:, 0],
        "queries.label_embed.weight": rows(num_classes + 1),
        "heads.class_embed.0.weight": rows(num_classes),
        "heads.class_embed.0.bias": rows(num_classes)[:, 0],
    }


def first_column(state):
    return {name: value.reshape(len(value), -1)[:, 0].tolist() for name, value in state.items()}


def test_rows_of_proposals_move_with_the_others():
    moved = move_rows(two_stage(3, 3), two_stage(4, 4, start=100), [(2, 0), (0, 3)])
    heads = [2, 101, 102, 0]
    assert first_column(moved) == {
        "queries.class_embed.weight": heads,
        "queries.class_embed.bias": heads,
        "queries.label_embed.weight": [*heads, 3],
        "heads.class_embed.0.weight": heads,
        "heads.class_embed.0.bias": heads,
    }


@pytest.mark.parametrize("old, new", [(3, 4), (3, 1), (1, 3), (1, 1)])
def test_what_tells_objects_from_background_has_no_class(old, new):
    state, fresh = two_stage(old, 1), two_stage(new, 1, start=100)
    moved = move_rows(state, fresh, [])
    for name in ("queries.class_embed.weight", "queries.class_embed.bias"):
        assert moved[name].equal(state[name])
    assert moved["heads.class_embed.0.bias"].equal(fresh["heads.class_embed.0.bias"])


@pytest.mark.parametrize("old, new", [(1, 3), (3, 1)])
def test_objectness_is_not_taken_for_a_class(old, new):
    # One of the models has objectness, the other a row for each of three classes.
    state, fresh = two_stage(3, old), two_stage(3, new, start=100)
    moved = move_rows(state, fresh, [(0, 0), (1, 1), (2, 2)])
    # Left to what loads the weights: the shapes differ.
    assert moved["queries.class_embed.bias"].equal(state["queries.class_embed.bias"])
    assert first_column(moved)["heads.class_embed.0.bias"] == [0, 1, 2]


def test_picked_rows():
    picked = first_column(take_rows(two_stage(4, 4), [3, 1]))
    assert picked["queries.class_embed.weight"] == [3, 1]
    assert picked["queries.label_embed.weight"] == [3, 1, 4]
    picked = first_column(take_rows(two_stage(4, 1), [3, 1]))
    assert picked["queries.class_embed.weight"] == picked["queries.class_embed.bias"] == [0]
    assert picked["heads.class_embed.0.bias"] == [3, 1]


def test_classes_are_counted_by_the_heads():
    state = two_stage(4, 1)
    assert count_classes(state) == count_classes(dict(reversed(state.items()))) == 4
    del state["heads.class_embed.0.weight"], state["heads.class_embed.0.bias"]
    assert count_classes(state) == 4
    assert count_classes({"queries.anchors": torch.zeros(3, 4)}) is None
