"""The loader for training. What it hands out is a function of a seed and can start anywhere.

detectron2's own draws the order of the images and their augmentation from generators that run on
in several processes and that no checkpoint holds: after a resume it begins anew.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from dn_detr.data.categories import DatasetError
from dn_detr.data.seeding import seeded
from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.data import DatasetFromList  # noqa: E402
from detectron2.data.build import trivial_batch_collator  # noqa: E402
from detectron2.utils import comm  # noqa: E402

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
Place = tuple[int, int]  # position in the stream, index of the image there

MAX_BAD_SHARE = 0.01  # of the images; above it a set is not one with a few broken files
_MAX_TRIES = 20
_SKIPPED = "skipped"  # key of a sample: {file name: message} of the images it stands in for


class IndexStream:
    """Which images make up the batches of one process; endless, and the same for the same seed.

    Position p of the stream is an image of epoch p // num_images, which has an order of its own.
    Images of a group are collected in the order of the stream until they are `batch_size`; the
    n-th batch goes to process n mod world_size.

    Attributes:
        start: number of images, of all processes, that were handed out before; a new iterator
            begins behind them.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        groups: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            num_images: at least 1.
            batch_size: of one process.
            seed: at least 0.
            groups: [num_images], the group of each image, such as of its aspect ratio; None: one.
            rank, world_size: this process, and the number of processes.
        """
        self.start = 0
        self._num_images = num_images
        self._batch_size = batch_size
        self._seed = seed
        self._groups = groups
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[list[Place]]:
        start = self.start
        # What is left in the groups depends on all that went before: then the stream is replayed.
        emitted = start if self._groups is None else 0
        waiting: defaultdict[int, list[Place]] = defaultdict(list)
        turn = 0
        for place in self._places(emitted):
            group = 0 if self._groups is None else self._groups[place[1]]
            waiting[group].append(place)
            if len(waiting[group]) < self._batch_size:
                continue
            batch = waiting.pop(group)
            if emitted >= start:
                if turn % self._world_size == self._rank:
                    yield batch
                turn += 1
            emitted += self._batch_size

    def _places(self, start: int) -> Iterator[Place]:
        first_epoch, offset = divmod(start, self._num_images)
        for epoch in itertools.count(first_epoch):
            order = np.random.default_rng((self._seed, epoch)).permutation(self._num_images)
            first = epoch * self._num_images
            for i in range(offset, self._num_images):
                yield first + i, int(order[i])
            offset = 0


class _Samples(Dataset):
    """The mapped image of a place in the stream."""

    def __init__(
        self, dataset: Any, mapper: Callable[[Sample], Sample], seed: int, skip_bad: bool
    ) -> None:
        self._dataset = dataset
        self._mapper = mapper
        self._seed = seed
        self._skip_bad = skip_bad

    def __getitem__(self, place: Place) -> Sample:
        position, index = place
        skipped: dict[str, str] = {}
        for tries in itertools.count():
            item = self._dataset[index]
            try:
                with seeded(self._seed, position, tries):
                    sample = self._mapper(item)
                return {**sample, _SKIPPED: skipped} if skipped else sample
            except DatasetError as error:
                if not self._skip_bad or tries == _MAX_TRIES:
                    raise
                skipped[item["file_name"]] = str(error)
            draw = np.random.default_rng((self._seed, position, tries))
            index = int(draw.integers(len(self._dataset)))
        raise AssertionError


class TrainLoader:
    """Endless batches for one process, see `build_train_loader`."""

    def __init__(
        self, samples: Dataset, stream: IndexStream, num_images: int, seed: int, **kwargs: Any
    ) -> None:
        """
        Args:
            samples, stream: what is handed out, and in which order.
            num_images: in the data set.
            seed: that both were made with.
            kwargs: of torch's DataLoader.
        """
        self.seed = seed
        self._stream = stream
        self._num_images = num_images
        self._bad: dict[str, str] = {}
        self._loader = DataLoader(samples, batch_sampler=stream, **kwargs)
        prepare_workers(self._loader)

    def start_behind(self, num_images: int) -> None:
        """Makes the next iterator begin where that many images, over all processes, are done."""
        self._stream.start = num_images

    def __iter__(self) -> Iterator[list[Sample]]:
        for batch in self._loader:
            for sample in batch:
                if isinstance(sample, Mapping) and _SKIPPED in sample:
                    self._count_skipped(sample.pop(_SKIPPED))
            yield batch

    def _count_skipped(self, messages: Mapping[str, str]) -> None:
        new = {file: text for file, text in messages.items() if file not in self._bad}
        self._bad.update(new)
        for text in new.values():
            logger.warning("%s Another image takes its place.", text)
        if len(self._bad) > MAX_BAD_SHARE * self._num_images:
            raise DatasetError(
                f"{len(self._bad)} of {self._num_images} images could not be used, more than "
                f"{MAX_BAD_SHARE:.0%}: {', '.join(list(self._bad)[:10])}. Mend or remove them; "
                f"tools/check_dataset.py --open-images lists all."
            )


def build_train_loader(
    dataset: Sequence[Sample],
    mapper: Callable[[Sample], Sample],
    total_batch_size: int,
    *,
    seed: int | None = None,
    aspect_ratio_grouping: bool = False,
    on_bad_image: str = "error",
    num_workers: int = 0,
    **kwargs: Any,
) -> TrainLoader:
    """Builds a loader whose batches depend on the seed only, not on processes' or workers' pace.

    Args:
        dataset: dicts as of `detection_dicts`; kept serialised, so that workers share the memory.
        mapper: called with a dict of `dataset`, to give a sample; what it draws from the generators
            of Python, numpy and torch is seeded by `seed` and the position of the image.
        total_batch_size: images of all processes together, divisible by their number.
        seed: at least 0; None: a random one, common to all processes.
        aspect_ratio_grouping: a process's batch has wide images only, or none (by `width` and
            `height`), as with detectron2's loader.
        on_bad_image: "error": an image that the mapper refuses (`DatasetError`) ends the training;
            "skip": another takes its place, and only more than `MAX_BAD_SHARE` of them end it.
        num_workers: processes that load; 0: none but this one.
        kwargs: more arguments of torch's DataLoader.

    Returns:
        an endless iterable of lists of samples.
    """
    world_size = comm.get_world_size()
    if total_batch_size % world_size:
        raise ValueError(f"total_batch_size={total_batch_size} for {world_size} processes")
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f'on_bad_image={on_bad_image!r}: expected "error" or "skip"')
    seed = comm.shared_random_seed() if seed is None else seed
    wide = [item["width"] > item["height"] for item in dataset] if aspect_ratio_grouping else None
    stream = IndexStream(
        len(dataset),
        total_batch_size // world_size,
        seed,
        groups=wide,
        rank=comm.get_rank(),
        world_size=world_size,
    )
    items = DatasetFromList(dataset, copy=False)
    samples = _Samples(items, mapper, seed, skip_bad=on_bad_image == "skip")
    kwargs.setdefault("collate_fn", trivial_batch_collator)
    return TrainLoader(samples, stream, len(dataset), seed, num_workers=num_workers, **kwargs)


def prepare_workers(loader: DataLoader) -> None:
    """Has a loader's workers start at once, and not end by a signal that is not for them.

    In a process that `launch` has started, torch would start a new Python for each of them, which
    takes seconds at every evaluation; forked ones share what is loaded.
    """
    if loader.num_workers and loader.multiprocessing_context is None and sys.platform == "linux":
        loader.multiprocessing_context = "fork"
    loader.worker_init_fn = functools.partial(_start_worker, before=loader.worker_init_fn)


def _start_worker(worker_id: int, before: Callable[[int], None] | None = None) -> None:
    """Makes a worker leave it to the process that trains to react to signals, and to end it.

    A signal that goes to a whole process group (Ctrl-C, Slurm's) would else end the workers, and
    with them the step that is to be finished. `before`: what the loader's user asked for.
    """
    if before is not None:
        before(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    """Obeys a SIGTERM of the process that trains, by which it ends what a loader has left."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
