"""COCO box AP, as pycocotools itself computes it."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.evaluation import COCOEvaluator  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from dn_detr.data.check import complete_annotations  # noqa: E402
from dn_detr.data.datasets import register_coco  # noqa: E402

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def build_evaluator(
    json: str,
    images: str,
    num_classes: int | None = None,
    output_dir: str | None = None,
) -> COCOEvaluator:
    """Builds the evaluator of a COCO-format set.

    Args:
        json: the annotation file.
        images: the folder of its images.
        num_classes: of the model: the number of categories, or 91 for COCO's sparse ids (see
            `dn_detr.data.datasets.class_mapping`); None: the number of categories.
        output_dir: where `coco_instances_results.json` and `instances_predictions.pth` go; None
            writes nothing.

    Returns:
        an evaluator whose `evaluate()` gives `{"bbox": {"AP": ..., "AP50": ..., "AP-name": ...}}`,
        each 0..100, in the main process and `{}` in the others.
    """
    return BoxEvaluator(
        register_coco(json, images, num_classes),
        tasks=("bbox",),
        output_dir=output_dir,
        use_fast_impl=False,  # detectron2's own is faster, but not what papers report
    )


class BoxEvaluator(COCOEvaluator):
    """COCOEvaluator for any COCO-format file.

    A model that finds nothing gets AP 0, not NaN or nothing; what annotations may leave out
    (``iscrowd``, ``area``) is filled in as for training, where pycocotools would stop; annotation
    ids may be any that training takes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        annotations = self._coco_api.dataset["annotations"]
        complete_annotations(annotations)
        # pycocotools takes an id of 0 for "not found", and cannot take a text.
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
        with contextlib.redirect_stdout(None):  # it prints
            self._coco_api.createIndex()

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, Any]:
        results = super().evaluate(img_ids)
        if not results and comm.is_main_process() and self._do_evaluation:
            return {"bbox": self._nothing_found()}
        return results

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            return self._nothing_found()
        # One name a category: where the classes of the model are COCO's 91 ids, the metadata has
        # names for the 11 gaps too, and detectron2 compares the counts.
        return super()._derive_coco_results(coco_eval, iou_type, self._category_names())

    def _nothing_found(self) -> dict[str, float]:
        logger.warning("The model predicts no box in any image: AP is 0.")
        names = (f"AP-{name}" for name in self._category_names())
        return dict.fromkeys([*METRICS, *names], 0.0)

    def _category_names(self) -> list[str]:
        api = self._coco_api
        return [category["name"] for category in api.loadCats(sorted(api.getCatIds()))]
