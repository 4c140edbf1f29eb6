"""Padded targets."""

import pytest
import torch

from dn_detr.layers import Targets


def test_pad_keeps_every_object_in_its_row():
    labels = [torch.tensor([3, 1]), torch.tensor([], dtype=torch.long), torch.tensor([2])]
    boxes = [torch.rand(2, 4), torch.zeros(0, 4), torch.rand(1, 4)]
    targets = Targets.pad(labels, boxes)
    assert targets.counts == (2, 0, 1) and targets.width == 2
    assert targets.valid.tolist() == [[True, True], [False, False], [True, False]]
    for image in range(3):
        assert torch.equal(targets.labels[image][targets.valid[image]], labels[image])
        assert torch.equal(targets.boxes[image][targets.valid[image]], boxes[image])


def test_pad_of_images_without_objects_has_no_columns():
    targets = Targets.pad([torch.tensor([], dtype=torch.long)] * 2, [torch.zeros(0, 4)] * 2)
    assert targets.labels.shape == (2, 0) and targets.boxes.shape == (2, 0, 4)


def test_pad_names_the_image_whose_boxes_do_not_fit():
    with pytest.raises(ValueError, match=r"image 1: boxes must have shape \(2, 4\)"):
        Targets.pad([torch.tensor([0]), torch.tensor([0, 1])], [torch.rand(1, 4), torch.rand(1, 4)])


def test_pad_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="non-zero number of images"):
        Targets.pad([], [])
