"""The detectron2 face of the detectors: list[dict] in, losses or Instances out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import CfgNode, configurable  # noqa: E402
from detectron2.modeling import META_ARCH_REGISTRY, Backbone  # noqa: E402
from detectron2.modeling.postprocessing import detector_postprocess  # noqa: E402
from detectron2.structures import Boxes, ImageList, Instances  # noqa: E402

from dn_detr.denoising import NoisedTargets  # noqa: E402
from dn_detr.layers import Targets  # noqa: E402
from dn_detr.meta_arch.yacs import model_arguments  # noqa: E402
from dn_detr.modeling import Predictions, SetCriterion  # noqa: E402


@META_ARCH_REGISTRY.register()
class DNDETR(nn.Module):
    """DETR-like detector with 4-D anchors, and denoising training where it is asked for.

    1. Backbone, neck and encoder turn images into tokens.
    2. The query source gives anchors and contents, learned or proposed by the encoder; in
       training, noised ground truth goes in front of them.
    3. The decoder refines the anchors, the heads read classes and boxes off every layer.
    4. In training, the denoising part is split off again and both parts meet the one criterion.

    Which model of the family it is (DAB-DETR, DN-DETR, DN-Deformable-DETR, DINO, ...) is decided by
    its parts, see ``projects/*/configs``.

    Args:
        backbone: detectron2 backbone.
        neck: (features, padding mask, padded) -> tokens.
        encoder: tokens -> tokens.
        queries: (tokens, noised targets or None) -> queries.
        decoder: (queries, tokens, refine) -> states and anchors of all layers.
        heads: (states, anchors) -> predictions, with a method `refine` for the decoder.
        criterion: losses of both parts.
        denoising: targets -> noised targets; None switches denoising off.
        num_classes: C. 91 means classes are COCO category ids, as in published checkpoints.
        pixel_mean, pixel_std: three numbers in the channel order of `input_format`, for pixels in
            0..255.
        input_format: channel order of the input, "RGB" or "BGR"; for tools, the model itself does
            not change it.
        detections_per_image: the best pairs of query and class that are kept (published: 300).
        detect_one_by_one: in evaluation every image goes through the network alone, whatever the
            batch. Otherwise images of a batch are padded to a common size, and what padding
            changes at its border (convolutions see it) moves the detections of the smaller ones.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: nn.Module,
        encoder: nn.Module,
        queries: nn.Module,
        decoder: nn.Module,
        heads: nn.Module,
        criterion: SetCriterion,
        num_classes: int,
        denoising: Callable[[Targets], NoisedTargets] | None = None,
        pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
        pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375),
        input_format: str = "RGB",
        detections_per_image: int = 300,
        detect_one_by_one: bool = True,
    ):
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.encoder = encoder
        self.queries = queries
        self.decoder = decoder
        self.heads = heads
        self.criterion = criterion
        self.denoising = denoising
        self.num_classes = num_classes
        self.input_format = input_format
        self.detections_per_image = detections_per_image
        self.detect_one_by_one = detect_one_by_one
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(list(value)).view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments from a yacs config, see `model_arguments`."""
        return model_arguments(cfg)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: detectron2's format. ``image``: [3, H, W], 0..255, in `input_format`.
                ``instances``: in training, with ``gt_boxes`` (xyxy pixels) and ``gt_classes``.
                ``height``, ``width``: size of the output in evaluation; that of ``image`` where
                missing.

        Returns:
            In training, the weighted losses of `SetCriterion`. Else for every image
            ``{"instances": Instances}`` with ``pred_boxes`` (xyxy pixels of the output),
            ``scores`` and ``pred_classes``, best first.
        """
        if self.training:
            return self.losses(batched_inputs)
        if self.detect_one_by_one:
            return [output for x in batched_inputs for output in self.detect([x])]
        return self.detect(batched_inputs)

    def detect(self, batched_inputs: list[dict]) -> list[dict]:
        """Detections of the images as one batch, see `forward`.

        Raises:
            ValueError: predictions that are not finite; detectron2 would drop such boxes.
        """
        predictions, images = self.predict(batched_inputs)
        _refuse_non_finite(predictions, batched_inputs)
        found = self.detections(predictions, images.image_sizes)
        sizes = [
            (x.get("height", size[0]), x.get("width", size[1]))
            for x, size in zip(batched_inputs, images.image_sizes)
        ]
        return [
            {"instances": detector_postprocess(instances, *size)}
            for instances, size in zip(found, sizes)
        ]

    def losses(
        self, batched_inputs: list[dict], noised: NoisedTargets | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses of a training step.

        Args:
            noised: denoise these instead of freshly noised ground truth, for parity and for study.
        """
        targets = self.targets(batched_inputs)
        if noised is None and self.denoising is not None:
            noised = self.denoising(targets)
        predictions, _ = self.predict(batched_inputs, noised)
        if noised is None:
            return self.criterion(predictions, targets)
        denoising, matching = split_predictions(predictions, noised)
        return self.criterion(matching, targets, denoising, noised)

    def predict(
        self, batched_inputs: list[dict], noised: NoisedTargets | None = None
    ) -> tuple[Predictions, ImageList]:
        """Predictions of all layers, denoising slots first, and the padded images."""
        images = self.preprocess(batched_inputs)
        height, width = images.tensor.shape[-2:]
        padded = any(size != (height, width) for size in images.image_sizes)
        features = self.backbone(images.tensor)
        tokens = self.encoder(self.neck(features, padding_mask(images), padded))
        queries = self.queries(tokens, noised)
        states, anchors = self.decoder(queries, tokens, self.heads.refine)
        return replace(self.heads(states, anchors), encoder=queries.proposals), images

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise, then pad at the right and the bottom: with the mean colour, therefore."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        return ImageList.from_tensors(
            [(image - self.pixel_mean) / self.pixel_std for image in images],
            self.backbone.size_divisibility,
        )

    def targets(self, batched_inputs: list[dict]) -> Targets:
        """Ground truth, normalised by the unpadded size and padded while it is still on the CPU."""
        if "instances" not in batched_inputs[0]:
            raise ValueError(
                "training needs 'instances' with gt_boxes and gt_classes in every input"
            )
        labels, boxes = [], []
        for x in batched_inputs:
            height, width = x["instances"].image_size
            scale = torch.tensor([width, height, width, height], dtype=torch.float32)
            gt_boxes = x["instances"].gt_boxes.tensor
            boxes.append(box_convert(gt_boxes / scale.to(gt_boxes.device), "xyxy", "cxcywh"))
            labels.append(x["instances"].gt_classes)
        targets = Targets.pad(labels, boxes)
        # Here it costs nothing; on an accelerator it would end in an assertion of a kernel.
        if targets.width and targets.labels.max() >= self.num_classes:
            raise ValueError(
                f"gt_classes go up to {targets.labels.max()}, but model.num_classes="
                f"{self.num_classes}: classes are 0..{self.num_classes - 1}"
            )
        return targets.to(self.device)

    @torch.no_grad()
    def detections(
        self, predictions: Predictions, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """The best pairs of query and class of the last layer; no NMS, no threshold.

        One query may give several.

        Args:
            image_sizes: (height, width) of the unpadded images.

        Returns:
            For each image Instances of that size, boxes in pixels and not clipped, best first.
        """
        probabilities = predictions.logits[-1].sigmoid().flatten(1)
        count = min(self.detections_per_image, probabilities.shape[1])
        scores, indices = probabilities.topk(count, dim=1)
        queries = (indices // self.num_classes)[..., None].expand(-1, -1, 4)
        boxes = box_convert(predictions.boxes[-1], "cxcywh", "xyxy").gather(1, queries)
        sizes = torch.tensor([(w, h, w, h) for h, w in image_sizes], dtype=boxes.dtype)
        boxes = boxes * sizes[:, None].to(boxes.device, non_blocking=True)
        return [
            Instances(size, pred_boxes=Boxes(box), scores=score, pred_classes=index)
            for size, box, score, index in zip(
                image_sizes, boxes, scores, indices % self.num_classes
            )
        ]


def _refuse_non_finite(predictions: Predictions, batched_inputs: list[dict]) -> None:
    last = torch.cat([predictions.boxes[-1].flatten(1), predictions.logits[-1].flatten(1)], 1)
    finite = last.isfinite().all(1)
    if not finite.all():
        bad = [x for x, good in zip(batched_inputs, finite.tolist()) if not good]
        names = ", ".join(str(x.get("image_id", x.get("file_name", "?"))) for x in bad)
        raise ValueError(
            f"image {names}: the predictions are not finite. Look for NaN in the weights and in "
            "the image, and for a number format that overflows."
        )


def padding_mask(images: ImageList) -> Tensor:
    """[B, H, W] bool, True on padding."""
    height, width = images.tensor.shape[-2:]
    sizes = torch.tensor([tuple(size) for size in images.image_sizes])
    sizes = sizes.to(images.tensor.device, non_blocking=True)
    y = torch.arange(height, device=sizes.device)
    x = torch.arange(width, device=sizes.device)
    return (y[:, None] >= sizes[:, 0, None, None]) | (x >= sizes[:, 1, None, None])


def split_predictions(
    predictions: Predictions, noised: NoisedTargets
) -> tuple[Predictions, Predictions]:
    """(denoising part, matching part with what the encoder predicts)"""
    (dn_logits, logits), (dn_boxes, boxes) = (
        noised.split(x, dim=2) for x in (predictions.logits, predictions.boxes)
    )
    return Predictions(dn_logits, dn_boxes), replace(predictions, logits=logits, boxes=boxes)
