"""A small DN-DETR in plain PyTorch: composed, trained and measured in this one file.

From the root of the repository, on the GPU where there is one, else on the CPU:

    python projects/plain_pytorch/train.py --output output/plain
    python projects/plain_pytorch/train.py --output output/plain_off --no-denoising
    python projects/plain_pytorch/train.py --output output/short --device cpu --steps 100

Where dn_detr is not installed, put `PYTHONPATH=.` in front. It needs torch, torchvision, numpy,
Pillow and SciPy, nothing else. But for the backbone, the model is the one of
projects/dn_detr/configs/shapes_demo.py. The output folder then holds model.pth (a state_dict),
curve.json and predictions.png.

Top to bottom: the detector, where the five steps of denoising are marked [1] to [5] as in the
README beside this file; the data; the measure and the picture; the training.

Shape letters: B images, Q queries, C classes, n or m objects.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from dn_detr.data.shapes import generate_shapes
from dn_detr.denoising import DenoisingGenerator, NoisedTargets
from dn_detr.layers import SinePositionEncoding, Targets
from dn_detr.modeling import (
    AnchorQueries,
    DABDecoder,
    DABEncoder,
    DetectionHeads,
    HungarianMatcher,
    Predictions,
    SetCriterion,
    SingleLevelNeck,
)

# ------------------------------------------------------------------------------------ the detector


def conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU."""
    layer = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Residual(nn.Sequential):
    """[B, channels, h, w] -> the same shape: two convolutions with a shortcut around them."""

    def __init__(self, channels: int):
        super().__init__(conv(channels, channels), conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Detector(nn.Module):
    """The parts of DN-DETR, in sizes for small images and minutes of training."""

    def __init__(self, num_classes: int, denoising: DenoisingGenerator | None):
        super().__init__()
        dim, transformer = 128, dict(num_heads=4, feedforward_dim=256, activation="relu")
        # Four periods an image where published models have one, and cross-attention that starts
        # out looking at the anchor: a short training needs sharp positions.
        temperature, scale = 20, 8 * math.pi
        sharp = dict(anchor_temperature=temperature, anchor_scale=scale, aligned_positions=3.0)
        position = SinePositionEncoding(dim, temperature, scale, offset=-0.5)
        self.backbone = nn.Sequential(  # [B, 3, H, W] -> [B, 128, H / 8, W / 8]
            *(conv(3, 16, stride=2), conv(16, 32, stride=2), Residual(32)),
            *(conv(32, 64, stride=2), Residual(64), conv(64, 128), Residual(128)),
        )
        self.neck = SingleLevelNeck("c3", 128, dim, position)
        # No encoder layer: in minutes it costs more steps than it gains.
        self.encoder = DABEncoder(dim, num_layers=0, **transformer)
        self.queries = AnchorQueries(40, dim, num_classes, anchor_init="grid", label_std=0.3)
        self.decoder = DABDecoder(dim, num_layers=3, **transformer, **sharp)
        self.heads = DetectionHeads(dim, num_classes, num_layers=3)
        self.criterion = SetCriterion(HungarianMatcher(), ce_weight=5.0)
        self.denoising = denoising  # without parameters: the model is the same with and without it

    def forward(self, images: Tensor, noised: NoisedTargets | None = None) -> Predictions:
        """uint8 [B, 3, H, W] -> predictions of all layers, those of the noised targets first."""
        features = {"c3": self.backbone((images.float() - 127.5) / 63.75)}
        # All images have one size, so nothing is padded; with several sizes, True marks padding.
        padding_mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
        tokens = self.encoder(self.neck(features, padding_mask, padded=False))
        # [2] The noised targets go in front of the matching queries, in the same form: the label
        #     becomes the content, the box becomes the anchor.
        # [3] With them goes a mask: a matching query that saw them would read the answer there,
        #     and so would one noised copy in another. The decoder just applies it in every layer.
        queries = self.queries(tokens, noised)
        states, anchors = self.decoder(queries, tokens, self.heads.refine)
        return self.heads(states, anchors)

    def losses(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Weighted losses by name; those of the denoising part start with "dn_"."""
        if self.denoising is None:
            return self.criterion(self(images), targets)
        # [1] Groups of noised copies of the ground truth, other noise in every step.
        noised = self.denoising(targets)
        both = self(images, noised)
        # [4] The denoising part comes off again right behind the heads: nothing else, and no
        #     inference, ever meets it.
        dn_logits, logits = noised.split(both.logits, dim=2)
        dn_boxes, boxes = noised.split(both.boxes, dim=2)
        # [5] One criterion for both parts. For the matching part it asks the Hungarian matcher
        #     which query answers for which object; a noised query's object is known in advance.
        #     So that part has a steady task while the matching of a young model still jumps about.
        matching, denoising = Predictions(logits, boxes), Predictions(dn_logits, dn_boxes)
        return self.criterion(matching, targets, denoising, noised)

    @torch.no_grad()
    def detect(self, images: Tensor, count: int = 100) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per image the best pairs of query and class, best first.

        Returns:
            Scores [n], labels [n] and boxes [n, 4] (xyxy in 0..1) of each image, on the CPU.
        """
        predictions = self(images)
        logits = predictions.logits[-1]  # the last layer's: [B, Q, C]
        scores, pairs = logits.sigmoid().flatten(1).topk(min(count, logits[0].numel()))
        query, labels = pairs // logits.shape[-1], pairs % logits.shape[-1]
        boxes = box_convert(predictions.boxes[-1], "cxcywh", "xyxy")
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        return list(zip(scores.cpu(), labels.cpu(), boxes.cpu()))


# ---------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Split:
    """Images in memory, with their objects.

    Attributes:
        images: uint8 [N, 3, H, W].
        labels, boxes: [m] class indices and [m, 4] boxes, cxcywh in 0..1, of each image.
        class_names: C names.
    """

    images: Tensor
    labels: list[Tensor]
    boxes: list[Tensor]
    class_names: list[str]


def read_split(root: Path, name: str) -> Split:
    """Reads ROOT/NAME.json (COCO format) and the images in ROOT/NAME.

    Raises:
        ValueError: the images differ in size.
    """
    coco = json.loads((root / f"{name}.json").read_text(encoding="utf-8"))
    sizes = {(image["width"], image["height"]) for image in coco["images"]}
    if len(sizes) != 1:
        raise ValueError(f"{name}.json: this script takes images of one size, not of {sizes}")
    categories = sorted(coco["categories"], key=lambda category: category["id"])
    label = {category["id"]: i for i, category in enumerate(categories)}
    objects = {image["id"]: [] for image in coco["images"]}
    for a in coco["annotations"]:
        objects[a["image_id"]].append([label[a["category_id"]], *a["bbox"]])
    tables = [torch.tensor(rows, dtype=torch.float32).view(-1, 5) for rows in objects.values()]
    scale = torch.tensor(2 * sizes.pop())
    files = [root / name / image["file_name"] for image in coco["images"]]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return Split(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        labels=[table[:, 0].long() for table in tables],
        boxes=[box_convert(table[:, 1:] / scale, "xywh", "cxcywh") for table in tables],
        class_names=[category["name"] for category in categories],
    )


def augment(image: Tensor, boxes: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Mirrors and transposes an image and its boxes as `chance`, three numbers in 0..1, says."""
    cx, cy, w, h = boxes.unbind(-1)
    if chance[0] < 0.5:
        image, cx = image.flip(-1), 1 - cx
    if chance[1] < 0.5:
        image, cy = image.flip(-2), 1 - cy
    if chance[2] < 0.5 and image.shape[-1] == image.shape[-2]:
        image, cx, cy, w, h = image.transpose(-1, -2), cy, cx, h, w
    return image, torch.stack([cx, cy, w, h], -1)


def random_batch(split: Split, size: int, random: torch.Generator) -> tuple[Tensor, Targets]:
    """`size` random images [B, 3, H, W], augmented, and their targets; all on the CPU."""
    chosen = torch.randint(len(split.images), (size,), generator=random).tolist()
    chances = torch.rand(size, 3, generator=random)
    pairs = [augment(split.images[i], split.boxes[i], c) for i, c in zip(chosen, chances)]
    return (
        torch.stack([image for image, _ in pairs]),
        Targets.pad([split.labels[i] for i in chosen], [boxes for _, boxes in pairs]),
    )


# ---------------------------------------------------------------------- the measure and the picture


def ap50(found: list[tuple[Tensor, Tensor, Tensor]], truth: Split) -> dict[str, float]:
    """Average precision at IoU 0.5, the area under the precision-recall curve, of each class.

    A measure of this script's own, to compare its runs by. It is not COCO's: one threshold, exact
    area instead of 101 points, no crowd regions.
    """
    result = {}
    for c, name in enumerate(truth.class_names):
        answers, total = [], 0
        for (scores, labels, boxes), label, box in zip(found, truth.labels, truth.boxes):
            wanted = box_convert(box[label == c], "cxcywh", "xyxy")
            overlaps = box_iou(boxes[labels == c], wanted).numpy()
            total += len(wanted)
            for score, overlap in zip(scores[labels == c].tolist(), overlaps):
                hit = bool(overlap.size) and overlap.max() >= 0.5
                if hit:
                    overlaps[:, overlap.argmax()] = 0  # found; a second box there is wrong
                answers.append((score, hit))
        if total:
            answers.sort(key=lambda answer: -answer[0])
            hits = np.array([hit for _, hit in answers], dtype=bool)
            precision = hits.cumsum() / np.arange(1, len(hits) + 1)
            best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
            result[name] = float(best_from_here[hits].sum() / total)  # a hit: 1 / total more recall
    return result


def draw(image: Tensor, title: str, boxes: Tensor, texts: list[str]) -> Image.Image:
    """An image [3, H, W], enlarged, with boxes [n, 4] (xyxy in 0..1) and their texts."""
    size = 256
    picture = Image.new("RGB", (size + 6, size + 20), "white")
    picture.paste(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size)), (3, 16))
    pen = ImageDraw.Draw(picture)
    pen.text((4, 2), title, fill="black")
    for x0, y0, x1, y1 in (boxes.clamp(0, 1) * size).tolist():
        for color, width in (("black", 3), ("yellow", 1)):  # a dark rim shows on any background
            pen.rectangle((3 + x0, 16 + y0, 3 + x1, 16 + y1), outline=color, width=width)
    for (x0, y0, _, _), text in zip((boxes.clamp(0, 1) * size).tolist(), texts):
        corner = (min(5 + x0, size - 6 * len(text)), max(4 + y0, 17))
        pen.rectangle(pen.textbbox(corner, text), fill="black")
        pen.text(corner, text, fill="yellow")
    return picture


def draw_predictions(path: Path, split: Split, found: list, threshold: float = 0.3) -> None:
    """The first eight images: predictions of at least `threshold`, below them the ground truth."""
    sheet = Image.new("RGB", (4 * 262, 4 * 276), "white")
    for i, (image, (scores, labels, boxes)) in enumerate(zip(split.images[:8], found)):
        kept = scores >= threshold
        texts = [f"{split.class_names[c]} {s:.2f}" for c, s in zip(labels[kept], scores[kept])]
        x, y = i % 4 * 262, i // 4 * 2 * 276
        title = f"predicted, score {threshold} and more"
        sheet.paste(draw(image, title, boxes[kept], texts), (x, y))
        boxes = box_convert(split.boxes[i], "cxcywh", "xyxy")
        texts = [split.class_names[c] for c in split.labels[i]]
        sheet.paste(draw(image, "ground truth", boxes, texts), (x, y + 276))
    sheet.save(path)


# ------------------------------------------------------------------------------------ the training


def train(model: Detector, split: Split, args: argparse.Namespace) -> list[dict[str, float]]:
    """Trains the model; returns the curve, the mean losses of every few steps."""
    parts = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parts[name.startswith("backbone.")].append(parameter)
    groups = [{"params": parts[True], "lr": 1.8e-3}, {"params": parts[False], "lr": 3e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    # Warm-up, then half a cosine.
    factors = [
        min((i + 1) / max(args.steps // 20, 1), (1 + math.cos(math.pi * i / args.steps)) / 2)
        for i in range(args.steps + 1)
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
    # Batches have a generator of their own: they are the same with and without denoising.
    random = torch.Generator().manual_seed(args.seed)
    curve, sums, period, start = [], {}, max(args.steps // 20, 1), time.monotonic()
    model.train()
    for step in range(1, args.steps + 1):
        images, targets = random_batch(split, args.batch_size, random)
        losses = model.losses(images.to(args.device), targets.to(torch.device(args.device)))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        for name, loss in losses.items():  # added up where they are: the device need not wait
            part = "denoising" if name.startswith("dn_") else "matching"
            sums[part] = sums.get(part, 0) + loss.detach() / period
        if step % period == 0:
            means = {part: value.item() for part, value in sums.items()}
            seconds, sums = time.monotonic() - start, {}
            curve.append({"step": step, "seconds": round(seconds, 1), **means})
            said = ", ".join(f"{part} {mean:.2f}" for part, mean in means.items())
            left = time.strftime("%H:%M:%S", time.gmtime(seconds / step * (args.steps - step)))
            print(f"step {step}/{args.steps}  loss: {said}  ETA {left}", flush=True)
    return curve


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Trains a small DN-DETR, in plain PyTorch.")
    parser.add_argument("--output", required=True, help="folder for weights, curve and picture")
    parser.add_argument("--data", default="datasets/shapes", help="folder; made when missing")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-denoising", action="store_true", help="denoising off, nothing else")
    args = parser.parse_args()
    if min(args.steps, args.batch_size) < 1:
        parser.error("--steps and --batch-size must be at least 1")
    data, output = Path(args.data), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        if not (data / "train.json").exists():
            print(f"drawing 3,300 images into {data} ...", flush=True)
            generate_shapes(str(data))
        train_split, val_split = read_split(data, "train"), read_split(data, "val")
    except (ValueError, OSError) as error:
        parser.error(f"--data {data}: {error}")

    torch.manual_seed(args.seed)
    num_classes = len(train_split.class_names)
    denoising = None if args.no_denoising else DenoisingGenerator(num_classes, groups=4)
    model = Detector(num_classes, denoising).to(args.device)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = "off" if args.no_denoising else "on"
    print(f"{parameters:,} learnable parameters, denoising {state}, on {args.device}", flush=True)
    curve = train(model, train_split, args)

    model.eval()
    batches = val_split.images.split(50)
    found = [found for images in batches for found in model.detect(images.to(args.device))]
    by_class = ap50(found, val_split)
    mean = sum(by_class.values()) / len(by_class)
    print(f"AP50 (this script's, on {len(found)} images): {mean:.3f}")
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in by_class.items()))
    torch.save(model.cpu().state_dict(), output / "model.pth")
    result = {"ap50_of_this_script": mean, "by_class": by_class, "learnable_parameters": parameters}
    report = {"arguments": vars(args), "result": result, "curve": curve}
    (output / "curve.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    draw_predictions(output / "predictions.png", val_split, found)
    print(f"model.pth, curve.json and predictions.png are in {output}")


if __name__ == "__main__":
    main()
