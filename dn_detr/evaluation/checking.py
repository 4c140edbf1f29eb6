"""What has to hold before an AP is computed: every image once, and values that can be compared.

pycocotools gives an AP for half of the images, for images that count twice and for boxes that are
NaN, and says nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.structures import Instances  # noqa: E402

logger = logging.getLogger(__name__)

SHOWN = 10  # image ids shown of each problem

BAD_VALUES = "Look for NaN in the weights, and for a number format (train.amp) that overflows."
BAD_CLASSES = "The model has other classes than the file: model.num_classes has to be that of both."


class EvaluationError(ValueError):
    """Predictions whose AP would not be that of the model; the message says why."""


class Collected(NamedTuple):
    """What one process predicted.

    Attributes:
        predictions: `{"image_id", "instances"}` of each image, in the order they were made.
        faults: what is wrong with values, as `find_faults` names it, and the ids of the images.
    """

    predictions: list[dict[str, Any]]
    faults: dict[str, list[Any]]


def find_faults(instances: Instances, num_classes: int) -> list[str]:
    """What is wrong with the values that were predicted for an image, and what to do.

    Scores only have to be finite: AP depends on their order alone.

    Args:
        instances: `pred_boxes` (xyxy), `scores` and `pred_classes`, on the CPU.
        num_classes: of the model, those of gaps between category ids included.
    """
    boxes, classes = instances.pred_boxes.tensor, instances.pred_classes
    found = {
        f"boxes that are NaN or infinite. {BAD_VALUES}": not boxes.isfinite().all(),
        f"boxes with a negative side. {BAD_VALUES}": (boxes[:, 2:] < boxes[:, :2]).any(),
        f"scores that are NaN or infinite. {BAD_VALUES}": not instances.scores.isfinite().all(),
        f"classes outside 0..{num_classes - 1}. {BAD_CLASSES}": (
            ((classes < 0) | (classes >= num_classes)).any()
        ),
    }
    return [fault for fault, is_there in found.items() if is_there]


def merge(
    collected: Sequence[Collected], image_ids: Collection[Any], source: str
) -> list[dict[str, Any]]:
    """The predictions of all processes, if they are those of every image once.

    Distributed samplers such as torch's repeat images to give all processes equally many. So an
    image may come from several processes where repetitions are fewer than processes. The one of the
    first process counts, without a comparison: the weights are the same, and the last digits may
    differ with the other images of a batch.

    Args:
        collected: by all processes, in the order of their ranks.
        image_ids: that are to be evaluated.
        source: the annotation file, for the message.

    Raises:
        EvaluationError: lists every problem with its number of images and the first ids.
    """
    problems = [*_bad_values(collected), *_bad_numbers_of_images(collected, image_ids)]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        processes = "1 process" if len(collected) == 1 else f"{len(collected)} processes"
        raise EvaluationError(
            f"there is no AP, since it would not be the model's ({len(image_ids)} images of "
            f"{source}, {processes}):\n{listed}"
        )
    first: dict[Any, dict[str, Any]] = {}
    for prediction in chain.from_iterable(c.predictions for c in collected):
        first.setdefault(prediction["image_id"], prediction)
    repeated = sum(len(c.predictions) for c in collected) - len(first)
    if repeated:
        logger.info("Counted once: %d images that the sampler gave to several processes.", repeated)
    return list(first.values())


def _bad_values(collected: Sequence[Collected]) -> Iterator[str]:
    for fault in dict.fromkeys(chain.from_iterable(c.faults for c in collected)):
        ids = chain.from_iterable(c.faults.get(fault, ()) for c in collected)
        yield f"{_shown(dict.fromkeys(ids))}: {fault}"


def _bad_numbers_of_images(
    collected: Sequence[Collected], image_ids: Collection[Any]
) -> Iterator[str]:
    by_process = [Counter(p["image_id"] for p in c.predictions) for c in collected]
    total = sum(by_process, Counter())
    wanted = set(image_ids)
    missing = [image for image in wanted if image not in total]
    unknown = [image for image in total if image not in wanted]
    twice = {image for counts in by_process for image, count in counts.items() if count > 1}
    shared = [image for image, count in total.items() if count > 1 and image not in twice]
    is_padding = sum(total[image] - 1 for image in shared) < len(collected)
    if missing:
        yield (
            f"{_shown(missing)}: no prediction. The test loader has to give every image, and the "
            "model an answer to each; for a part of them: evaluate(img_ids=...)."
        )
    if unknown:
        yield (
            f"{_shown(unknown)}: not among those to evaluate. dataloader.test and "
            "dataloader.evaluator have to be of the same file."
        )
    if twice:
        yield f"{_shown(twice)}: predicted twice by one process. The test loader's sampler repeats."
    if shared and not is_padding:
        yield (
            f"{_shown(shared)}: predicted by several processes. The test loader's sampler has to "
            "share images among processes, as detectron2's InferenceSampler does."
        )


def _shown(ids: Iterable[Any]) -> str:
    """`image 4` or `3 images (4, 7, 8)`, the first ids in their order."""
    ids = sorted(ids, key=lambda id_: (isinstance(id_, str), id_))
    more = ", ..." if len(ids) > SHOWN else ""
    shown = ", ".join(map(str, ids[:SHOWN])) + more
    return f"image {shown}" if len(ids) == 1 else f"{len(ids)} images ({shown})"
