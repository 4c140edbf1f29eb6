"""The loader for training: a function of the seed, whoever asks, and from wherever."""

import itertools
import logging
import random
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from dn_detr.data.categories import DatasetError
from dn_detr.data.loader import IndexStream, build_train_loader


def take(iterable, count):
    return list(itertools.islice(iterable, count))


def places(count, start=0, **kwargs):
    """The first batches of a stream of 7 images, two at a time."""
    stream = IndexStream(**{"num_images": 7, "batch_size": 2, "seed": 3, **kwargs})
    stream.start = start
    return take(stream, count)


GROUPS = [0, 1, 1, 0, 0, 1, 0]


def test_every_epoch_has_every_image_once_in_an_order_of_its_own():
    found = list(itertools.chain(*places(14)))
    assert [position for position, _ in found] == list(range(28))
    epochs = [tuple(image for _, image in found[i : i + 7]) for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_the_seed_decides():
    assert places(9) == places(9)
    assert places(9) != places(9, seed=4)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_processes_share_what_one_would_see(groups):
    alone = places(12, groups=groups)
    shared = [places(6, groups=groups, rank=rank, world_size=2) for rank in range(2)]
    assert [batch for pair in zip(*shared) for batch in pair] == alone


@pytest.mark.fault(62)
@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_goes_on_anywhere(groups, world_size):
    for rank in range(world_size):
        kwargs = dict(groups=groups, rank=rank, world_size=world_size)
        straight = places(30, **kwargs)
        for done in range(1, 25):
            start = done * 2 * world_size
            assert places(5, start=start, **kwargs) == straight[done : done + 5]


def test_a_stream_goes_on_with_another_number_of_processes():
    straight = places(20)
    resumed = [places(5, start=8, rank=rank, world_size=2) for rank in range(2)]
    assert [batch for pair in zip(*resumed) for batch in pair] == straight[4:14]


def test_batches_are_of_one_group_and_no_image_is_lost():
    batches = places(35, groups=GROUPS)
    assert all(len({GROUPS[image] for _, image in batch}) == 1 for batch in batches)
    counts = Counter(image for batch in batches for _, image in batch)
    assert max(counts.values()) - min(counts.values()) <= 1


def dataset(count, bad=()):
    return [
        {"file_name": f"{i}.jpg", "image_id": i, "width": 8 + i % 2, "height": 8, "bad": i in bad}
        for i in range(count)
    ]


def draw_all(item):
    """A mapper that draws from every generator."""
    if item["bad"]:
        raise DatasetError(f"{item['file_name']} cannot be read.")
    return {**item, "drawn": (random.random(), np.random.rand(), torch.rand(()).item())}


def load(count, images=7, start=0, bad=(), **kwargs):
    loader = build_train_loader(
        dataset(images, bad), draw_all, total_batch_size=2, **{"seed": 5, **kwargs}
    )
    loader.start_behind(start)
    return take(loader, count)


@pytest.mark.fault(62)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouping", [False, True])
def test_samples_do_not_depend_on_workers_and_start(workers, grouping):
    straight = load(9, aspect_ratio_grouping=grouping)
    assert load(9, num_workers=workers, aspect_ratio_grouping=grouping) == straight
    resumed = load(5, start=8, num_workers=workers, aspect_ratio_grouping=grouping)
    assert resumed == straight[4:]


@pytest.mark.fault(63)
def test_another_seed_gives_other_images_and_other_augmentation():
    first, second = load(7, seed=1), load(7, seed=2)
    assert [[x["image_id"] for x in b] for b in first] != [
        [x["image_id"] for x in b] for b in second
    ]
    drawn = {x["drawn"] for batch in first + second for x in batch}
    assert len(drawn) == 28  # an image seen again is augmented in another way


def test_loading_leaves_the_generators_of_the_training_alone():
    loader = build_train_loader(dataset(7), draw_all, total_batch_size=2, seed=5)
    batches = iter(loader)
    next(batches)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(batches)
    assert torch.rand(3).equal(expected)


def test_groups_follow_the_shape_of_the_images():
    for batch in load(9, aspect_ratio_grouping=True):
        assert len({x["width"] > x["height"] for x in batch}) == 1


@pytest.mark.fault(44)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_or_is_replaced(workers, caplog):
    with pytest.raises(DatasetError, match="3.jpg cannot be read"):
        load(200, images=200, bad=[3], num_workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = load(300, images=200, bad=[3], on_bad_image="skip", num_workers=workers)
    images = [x["image_id"] for batch in batches for x in batch]
    assert len(images) == 600 and 3 not in images
    assert caplog.text.count("3.jpg cannot be read. Another image takes its place.") == 1
    assert all("skipped" not in x for batch in batches for x in batch)
    again = load(300, images=200, bad=[3], on_bad_image="skip")
    assert again == batches


@pytest.mark.fault(44)
def test_too_many_bad_images_stop():
    with pytest.raises(DatasetError, match="3 of 200 images could not be used, more than 1%"):
        load(300, images=200, bad=[3, 50, 60], on_bad_image="skip")
    with pytest.raises(DatasetError, match="cannot be read|could not be used"):
        load(1, images=7, bad=range(7), on_bad_image="skip")


@pytest.mark.fault(44)
def test_a_hundredth_may_be_bad_and_each_has_a_stand_in_of_its_own(caplog):
    batches = load(300, images=200, bad=[3, 60], on_bad_image="skip")
    straight = load(300, images=200)
    stand_ins = [
        found["image_id"]
        for pair in zip(itertools.chain(*batches), itertools.chain(*straight))
        for found, wanted in [pair]
        if wanted["image_id"] in (3, 60)
    ]
    assert len(stand_ins) == 6 and len(set(stand_ins)) > 2
    with pytest.raises(DatasetError, match="3 of 299 images could not be used"):
        load(450, images=299, bad=[3, 60, 70], on_bad_image="skip")


def test_a_worker_is_initialised_as_asked():
    loader = build_train_loader(
        dataset(7),
        draw_all,
        total_batch_size=2,
        seed=5,
        num_workers=1,
        worker_init_fn=_leave_a_mark,
    )
    with pytest.raises(RuntimeError, match="worker 0 was initialised"):
        next(iter(loader))


def _leave_a_mark(worker_id):
    raise RuntimeError(f"worker {worker_id} was initialised")


def test_a_batch_that_processes_cannot_share(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="total_batch_size=3 for 2 processes"):
        build_train_loader(dataset(7), draw_all, total_batch_size=3, seed=5)


def test_wrong_arguments():
    with pytest.raises(ValueError, match='on_bad_image=\'no\': expected "error" or "skip"'):
        load(1, on_bad_image="no")
