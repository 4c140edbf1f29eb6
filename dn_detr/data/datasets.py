"""COCO-format data sets in detectron2's terms.

The annotation file is read by ``dn_detr.data.check`` and not by detectron2's ``load_coco_json``:
it is parsed once for the check and the data, and what the check mended is what a model trains on.
"""

import hashlib
import os
from typing import Any

from dn_detr.data.categories import (
    class_mapping,
    count_images,
    read_categories,
    unusual_categories,
)
from dn_detr.data.check import check_coco, log_once
from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402

__all__ = [
    "class_mapping",
    "count_images",
    "detection_dicts",
    "read_categories",
    "register_coco",
]


def detection_dicts(
    json: str, images: str, num_classes: int | None = None, strict: bool = False
) -> list[dict[str, Any]]:
    """The images of a COCO-format set with their boxes, as detectron2's loaders take them.

    Args:
        json: a COCO-format annotation file.
        images: the folder that its file names are relative to.
        num_classes: number of classes of the model; None: one a category.
        strict: refuse a file with boxes to clip or to drop, instead of mending it.

    Returns:
        One dict an image, sorted by image id, those without boxes too: ``file_name``, ``height``,
        ``width``, ``image_id`` and ``annotations`` (``bbox`` xywh in pixels and inside the image,
        ``bbox_mode``, ``category_id`` (the class index), ``iscrowd``).

    Raises:
        DatasetError: the set cannot be used (see ``check_coco``), or ``num_classes`` does not fit.
    """
    report = check_coco(json, images, strict)
    _, class_of = class_mapping(report.categories, num_classes, source=json)
    unusual = unusual_categories(report.categories, num_classes)
    if unusual:
        log_once(str(unusual))
    objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in report.images}
    for annotation in report.annotations:
        objects[annotation["image_id"]].append(
            {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": class_of[annotation["category_id"]],
                "iscrowd": annotation["iscrowd"],
            }
        )
    root = os.path.expanduser(images)
    return [
        {
            "file_name": os.path.join(root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": objects[image["id"]],
        }
        for image in report.images
    ]


def register_coco(json: str, images: str, num_classes: int | None = None) -> str:
    """Makes a COCO-format set known to detectron2's catalogs; images are read when asked for.

    Calling it again with the same arguments gives the same name, and the file's present categories.

    Args:
        json: a COCO-format annotation file.
        images: the folder that its file names are relative to.
        num_classes: number of classes of the model; None: one a category.

    Returns:
        The set's name in ``DatasetCatalog`` and ``MetadataCatalog``.

    Raises:
        DatasetError: the categories cannot be read, or ``num_classes`` does not fit them.
    """
    names, class_of = class_mapping(read_categories(json), num_classes, source=json)
    if len(names) > len(class_of):
        # COCOEvaluator wants every class to have a category id. Ids of gaps are not in the file,
        # and pycocotools passes over predictions of them.
        class_of = {i: i for i in range(len(names))}
    json, images = (os.path.abspath(os.path.expanduser(path)) for path in (json, images))
    key = hashlib.sha256(f"{json}\n{images}\n{num_classes}".encode()).hexdigest()[:8]
    name = f"{os.path.splitext(os.path.basename(json))[0]}_{key}"
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: detection_dicts(json, images, num_classes))
    MetadataCatalog.get(name).set(
        json_file=json,
        image_root=images,
        evaluator_type="coco",
        thing_classes=names,
        thing_dataset_id_to_contiguous_id=class_of,
    )
    return name
