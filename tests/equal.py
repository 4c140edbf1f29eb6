"""Comparison bit by bit."""

from typing import Any

import torch


def assert_equal(first: Any, second: Any, where: str = "checkpoint") -> None:
    """Bitwise, through dicts and lists."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}[{key!r}]")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for i, pair in enumerate(zip(first, second)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert first == second or (first != first and second != second), where
