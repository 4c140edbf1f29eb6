"""The detectron2 face: its contract, in training and evaluation, on awkward batches."""

from pathlib import Path

import pytest
import torch

from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from dn_detr.engine.overrides import ConfigError
from dn_detr.meta_arch import DNDETR, add_dn_detr_config
from tests.meta_arch import small

CONFIG = Path(__file__).parents[2] / "projects" / "dn_detr" / "configs" / "shapes_demo.py"
TINY = (
    "model.num_classes=3",
    "model.neck.embed_dim=32",
    "model.queries.num_queries=9",
    "model.encoder.feedforward_dim=16",
    "model.decoder.feedforward_dim=16",
    "model.decoder.num_layers=2",
)


def build(*overrides):
    torch.manual_seed(0)
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(CONFIG)), [*TINY, *overrides])
    return instantiate(cfg.model)


def make_input(height=96, width=64, objects=2, seed=0, **extra):
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
    start = torch.rand(objects, 2, generator=g) * 0.5
    corners = torch.cat([start, start + 0.1 + 0.4 * torch.rand(objects, 2, generator=g)], 1)
    instances = Instances(
        (height, width),
        gt_boxes=Boxes(corners * torch.tensor([width, height, width, height])),
        gt_classes=torch.randint(0, 3, (objects,), generator=g),
    )
    return {"image": image, "instances": instances, **extra}


BATCHES = {
    "equal sizes": [(96, 64, 2), (96, 64, 3)],
    "padded": [(96, 64, 2), (64, 112, 5)],
    "one image empty": [(96, 64, 0), (64, 96, 2)],
    "all images empty": [(96, 64, 0), (64, 96, 0)],
    "more objects than queries": [(96, 64, 12), (96, 64, 1)],
    "one image": [(80, 48, 1)],
}


@pytest.mark.fault(48)
@pytest.mark.fault(61)
@pytest.mark.parametrize("denoising", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_gives_the_same_loss_names_and_trains_every_parameter(batch, denoising):
    model = build(*([] if denoising else ["model.denoising=null"])).train()
    losses = model([make_input(*size, seed=i) for i, size in enumerate(BATCHES[batch])])
    names = {f"loss_{kind}{layer}" for kind in ("ce", "bbox", "giou") for layer in ("", "_0")}
    assert set(losses) == (names | {f"dn_{name}" for name in names} if denoising else names)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_evaluation_gives_sorted_clipped_instances_of_the_output_size():
    model = build("model.detections_per_image=7").eval()
    with torch.no_grad():
        outputs = model(
            [
                make_input(height=96, width=64, seed=1) | {"height": 192, "width": 640},
                make_input(64, 112),
            ]
        )
    sizes = [(192, 640), (64, 112)]
    for output, size in zip(outputs, sizes):
        found = output["instances"]
        assert found.image_size == size and 0 < len(found) <= 7
        assert (found.scores.diff() <= 0).all()
        assert found.pred_classes.min() >= 0 and found.pred_classes.max() < 3
        boxes = found.pred_boxes.tensor
        assert (
            boxes.min() >= 0 and (boxes[:, 2] <= size[1]).all() and (boxes[:, 3] <= size[0]).all()
        )


def test_only_a_padded_batch_has_a_mask():
    """Attention without a mask is faster."""
    model, masks = build().eval(), []
    model.encoder.register_forward_pre_hook(lambda _, args: masks.append(args[0].padding_mask))
    with torch.no_grad():
        for sizes in (((96, 64), (96, 64)), ((96, 64), (64, 64))):
            model.predict([make_input(*size) for size in sizes])
    assert masks[0] is None and masks[1].any(1).tolist() == [False, True]


def test_evaluation_does_not_need_instances_and_training_says_that_it_does():
    model, x = build(), make_input()
    del x["instances"]
    assert "instances" in model.eval()([x])[0]
    with pytest.raises(ValueError, match="needs 'instances' with gt_boxes and gt_classes"):
        model.train()([x])


def test_targets_are_relative_to_the_unpadded_image():
    model = build()
    instances = Instances(
        (50, 200), gt_boxes=Boxes([[20.0, 10.0, 60.0, 30.0]]), gt_classes=torch.tensor([1])
    )
    targets = model.targets([{"instances": instances}, make_input(96, 64, objects=3)])
    torch.testing.assert_close(targets.boxes[0, 0], torch.tensor([0.2, 0.4, 0.2, 0.4]))
    assert targets.counts == (1, 3) and targets.valid.sum() == 4


def test_classes_that_the_model_does_not_have_are_refused():
    x = make_input()
    x["instances"].gt_classes[1] = 3
    with pytest.raises(ValueError, match="go up to 3, but model.num_classes=3: classes are 0..2"):
        build().train()([x])


def test_one_query_may_give_several_detections_and_boxes_follow_their_queries():
    from dn_detr.modeling import Predictions

    model = build("model.detections_per_image=3")
    logits = torch.full((1, 1, 4, 3), -9.0)
    logits[0, 0, 2] = torch.tensor([3.0, -9.0, 1.0])
    logits[0, 0, 1, 1] = 2.0
    boxes = torch.rand(1, 1, 4, 4)
    boxes[0, 0, 2] = torch.tensor([0.5, 0.5, 0.5, 0.25])
    (found,) = model.detections(Predictions(logits, boxes), [(40, 80)])
    assert found.pred_classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    torch.testing.assert_close(found.pred_boxes.tensor[0], torch.tensor([20.0, 15.0, 60.0, 25.0]))
    torch.testing.assert_close(found.pred_boxes.tensor[2], found.pred_boxes.tensor[0])


def test_given_noised_targets_are_used():
    model, batch = build().train(), [make_input(), make_input(seed=1, objects=3)]
    model.backbone.eval()  # batch norm would make two passes differ
    noised = model.denoising(model.targets(batch))
    a, b = model.losses(batch, noised=noised), model.losses(batch, noised=noised)
    torch.testing.assert_close(a, b)
    other = model.losses(batch)
    assert other["dn_loss_bbox"] != a["dn_loss_bbox"]
    torch.testing.assert_close(other["loss_bbox"], a["loss_bbox"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoder_layers", [0, 1])
def test_number_format_follows_to(dtype, encoder_layers):
    model = build(f"model.encoder.num_layers={encoder_layers}")
    batch = [make_input(96, 64), make_input(64, 112, seed=1)]
    with torch.no_grad():
        expected = model.eval().predict(batch)[0].boxes
        boxes = model.to(dtype).predict(batch)[0].boxes
    torch.testing.assert_close(boxes.float(), expected, rtol=0.05, atol=0.02)
    losses = model.train()(batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


def test_pixel_statistics_follow_the_model_and_stay_out_of_checkpoints():
    model = build()
    assert model.to(torch.float64).pixel_mean.dtype == torch.float64
    assert not any("pixel" in name for name in model.state_dict())


def yacs(**node):
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DNDETR"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.DN_DETR.update(node)
    return cfg


def test_build_model_from_yacs_gives_the_same_network():
    torch.manual_seed(0)
    model = build_model(yacs(CONFIG_FILE=str(CONFIG), OVERRIDES=list(TINY)))
    assert isinstance(model, DNDETR)
    expected = build()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    x = make_input()
    a, b = (m.eval()([x])[0]["instances"] for m in (model, expected))
    assert torch.equal(a.scores, b.scores) and a.scores.numel() > 0


def test_yacs_without_a_config_file_says_what_is_missing():
    with pytest.raises(ValueError, match="needs MODEL.DN_DETR.CONFIG_FILE"):
        build_model(yacs())


def test_yacs_takes_the_classes_of_the_training_data():
    from detectron2.data import MetadataCatalog

    MetadataCatalog.get("four_classes").thing_classes = list("abcd")
    cfg = yacs(CONFIG_FILE=str(CONFIG), OVERRIDES=[*TINY[1:], "model.num_classes=null"])
    cfg.DATASETS.TRAIN = ("four_classes",)
    assert build_model(cfg).num_classes == 4
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="leaves model.num_classes open"):
        build_model(cfg)


@pytest.mark.fault(1)
def test_yacs_overrides_are_checked():
    cfg = yacs(CONFIG_FILE=str(CONFIG), OVERRIDES=[*TINY, "model.num_querys=5"])
    with pytest.raises(ConfigError, match="unknown key model.num_querys; did you mean model.quer"):
        build_model(cfg)


@pytest.mark.fault(50)
@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("number", [None, 0, "5"])
def test_a_number_of_classes_is_asked_for(family, number):
    with pytest.raises(ValueError, match=f"model.num_classes={number}: a model needs an integer"):
        small.small_model(family, num_classes=number)


@pytest.mark.fault(50)
def test_without_denoising_a_number_of_classes_is_asked_for():
    with pytest.raises(ValueError, match="model.num_classes=None: a model needs an integer"):
        build("model.num_classes=null", "model.queries.labels=False", "model.denoising=null")
