"""Random numbers that follow from what they are for, so that no state of a generator is kept."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_generators(*entropy: int) -> None:
    """Seeds the generators of Python, numpy and torch, the accelerators' too.

    Args:
        entropy: what the numbers are for, such as (seed, iteration, process); integers of at least
            0. Different ones give independent numbers, also where they differ by one.
    """
    words = _seed_cpu(entropy)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(_join(words))


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Within it the CPU's generators are seeded; behind it they go on as if nothing had been."""
    python, numpy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(entropy)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(state)


def _seed_cpu(entropy: tuple[int, ...]) -> np.ndarray:
    # The length, since a sequence is filled up with zeros: (1, 2) would be (1, 2, 0).
    words = np.random.SeedSequence((len(entropy), *entropy)).generate_state(4)
    random.seed(_join(words))
    np.random.seed(words)
    # Not torch.manual_seed, which would seed the accelerators, too.
    torch.default_generator.manual_seed(_join(words))
    return words


def _join(words: np.ndarray) -> int:
    return int(words[0]) << 31 ^ int(words[1])  # 63 bits
