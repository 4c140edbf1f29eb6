"""A training step never makes the host wait for the accelerator, but for the one hand-over."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.meta_arch.small import FAMILIES, small_model
from tests.meta_arch.test_dn_detr import make_input

# Each needs the values of a tensor on the host, or sizes that follow from them.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class Recorder(TorchDispatchMode):
    """Names of the operations that wait, and how many there were in all."""

    def __init__(self):
        super().__init__()
        self.waiting, self.number = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.number += 1
        boolean_index = name == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or boolean_index:
            self.waiting.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_waits(family):
    model = small_model(family).train()
    inputs = [make_input(96, 128, 2), make_input(64, 80, 5, seed=1), make_input(64, 64, 0)]
    # Targets, and detectron2's sizes of images, are read on the host, where they are.
    targets, images = model.targets(inputs), model.preprocess(inputs)
    model.targets, model.preprocess = lambda inputs: targets, lambda inputs: images
    with Recorder() as recorder:
        losses = model(inputs)
        sum(losses.values()).backward()
    assert recorder.waiting == [] and recorder.number > 500


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_has_as_many_operations_for_any_number_of_objects(family):
    """No loop over boxes."""
    numbers = []
    for objects in (3, 12):
        model = small_model(family).train()
        with Recorder() as recorder:
            model([make_input(96, 128, objects), make_input(64, 80, 1, seed=1)])
        numbers.append(recorder.number)
    assert numbers[0] == numbers[1]
