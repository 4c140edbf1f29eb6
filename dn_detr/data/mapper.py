"""From a data set's dict to the dict that a model takes: reading, augmentation, boxes."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dn_detr.data.categories import DatasetError
from dn_detr.data.images import ImageError, read_image, size_error
from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.data import transforms as T  # noqa: E402
from detectron2.structures import Boxes, BoxMode, Instances  # noqa: E402


class DetrDatasetMapper:
    """Reads an image, augments it, and turns its annotations into ``Instances``, as DETR does.

    1. The image is read (any mode, 16 bits, turned by EXIF: ``dn_detr.data.images``) and must have
       the size that the annotation file says.
    2. The augmentations are applied to image and boxes.
    3. For training: crowd boxes are removed, boxes are clipped to the augmented image and removed
       where nothing is left of them. An image may end with no box at all, and is kept.

    Args:
        is_train: whether to give ``instances``; without, annotations are left out.
        augmentations: applied in this order (DETR's are in ``configs/common/data/coco.py``).
        image_format: channel order, "RGB" or "BGR".
    """

    def __init__(
        self,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform] = (),
        image_format: str = "RGB",
    ) -> None:
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format={image_format!r}: expected RGB or BGR")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Maps one image.

        Args:
            dataset_dict: an entry of ``detection_dicts``; not changed.

        Returns:
            ``file_name``, ``height``, ``width`` (of the file's image), ``image_id``, ``image``
            (uint8 [C, H', W'], augmented) and for training ``instances`` with ``gt_boxes`` (xyxy,
            pixels of the augmented image) and ``gt_classes``.

        Raises:
            DatasetError: the image cannot be read, or has another size than the annotations say.
        """
        result = {k: copy.deepcopy(v) for k, v in dataset_dict.items() if k != "annotations"}
        image = self._read(dataset_dict)
        annotations = [a for a in dataset_dict.get("annotations", ()) if not a.get("iscrowd", 0)]
        aug_input = T.AugInput(image, boxes=_boxes(annotations))
        self.augmentations(aug_input)
        result["image"] = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        if self.is_train:
            classes = np.array([a["category_id"] for a in annotations], dtype=np.int64)
            result["instances"] = _instances(aug_input.image.shape[:2], aug_input.boxes, classes)
        return result

    def _read(self, dataset_dict: dict[str, Any]) -> np.ndarray:
        name = f"The image {dataset_dict['file_name']} (id {dataset_dict.get('image_id')})"
        try:
            image, orientation = read_image(dataset_dict["file_name"])
        except ImageError as error:
            raise DatasetError(f"{name} cannot be read: {error}. {self._remedy()}") from error
        height, width = image.shape[:2]
        expected = dataset_dict.get("width", width), dataset_dict.get("height", height)
        difference = size_error((width, height), expected, orientation)
        if difference:
            raise DatasetError(
                f"{name} is {difference}. Correct the entry and its boxes, or the image."
            )
        return image[:, :, ::-1] if self.image_format == "BGR" else image

    def _remedy(self) -> str:
        skip = ", or pass over such images: dataloader.train.on_bad_image=skip"
        return f"Replace the file, or remove its entry{skip if self.is_train else ''}."


def _boxes(annotations: list[dict[str, Any]]) -> np.ndarray:
    """xyxy boxes in pixels, float32 [N, 4]."""
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32).reshape(-1, 4)
    is_xywh = np.array([a["bbox_mode"] == BoxMode.XYWH_ABS for a in annotations], dtype=bool)
    boxes[is_xywh, 2:] += boxes[is_xywh, :2]
    return boxes


def _instances(size: tuple[int, int], boxes: np.ndarray, classes: np.ndarray) -> Instances:
    height, width = size
    boxes = boxes.clip(0, (width, height, width, height)).astype(np.float32)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.from_numpy(boxes[keep]))
    instances.gt_classes = torch.from_numpy(classes[keep])
    return instances
