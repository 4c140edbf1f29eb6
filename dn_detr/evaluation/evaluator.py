"""COCO box AP, as pycocotools itself computes it."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from typing import Any

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.evaluation import COCOEvaluator  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from dn_detr.data.check import complete_annotations  # noqa: E402
from dn_detr.data.datasets import register_coco  # noqa: E402
from dn_detr.engine.distributed import on_main_process  # noqa: E402
from dn_detr.evaluation.checking import Collected, find_faults, merge  # noqa: E402

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
    """COCOEvaluator for any COCO-format file, that gives the AP of all images or none.

    A model that finds nothing gets AP 0, not NaN or nothing; what annotations may leave out
    (``iscrowd``, ``area``) is filled in as for training, where pycocotools would stop; annotation
    ids may be any that training takes. What `dn_detr.evaluation.checking` refuses has no AP.
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

    def reset(self) -> None:
        super().reset()
        self._faults: dict[str, list[Any]] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to(self._cpu_device)
            super().process([image], [{"instances": instances}])
            for fault in find_faults(instances, len(self._metadata.thing_classes)):
                self._faults.setdefault(fault, []).append(image["image_id"])

    def evaluate(self, img_ids: list[Any] | None = None) -> dict[str, Any]:
        """Computes AP; all processes have to get here.

        Args:
            img_ids: the images to evaluate, each of them predicted once; None: all of the file.

        Returns:
            see `build_evaluator`.

        Raises:
            EvaluationError: in the main process, with the number and ids of images that are
                missing, repeated, unknown, or predicted with values that cannot be compared.
            SharedError: in the others.
        """
        own = Collected(self._predictions, self._faults)
        if not self._distributed:
            return self._evaluate([own], img_ids)
        results = on_main_process(self._evaluate, comm.gather(own), img_ids)
        return results if comm.is_main_process() else {}

    def _evaluate(self, collected: list[Collected], img_ids: list[Any] | None) -> dict[str, Any]:
        wanted = self._coco_api.getImgIds() if img_ids is None else img_ids
        self._predictions = merge(collected, wanted, self._metadata.json_file)
        is_distributed, self._distributed = self._distributed, False  # all is here
        try:
            results = super().evaluate(img_ids)
        finally:
            self._distributed = is_distributed
        if not results and self._do_evaluation:
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
        """In the order of the ids; a name of several categories comes with the id."""
        api = self._coco_api
        categories = api.loadCats(sorted(api.getCatIds()))
        count = Counter(category["name"] for category in categories)
        return [
            c["name"] if count[c["name"]] == 1 else f"{c['name']} (id {c['id']})"
            for c in categories
        ]
