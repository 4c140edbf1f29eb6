"""Every shipped config: builds, survives saving, trains every parameter, detects."""

from pathlib import Path

import pytest
import torch

from detectron2.config import LazyConfig, instantiate

from tests.meta_arch.test_dn_detr import make_input

CONFIGS = sorted((Path(__file__).parents[2] / "projects").glob("*/configs/*.py"))
NUM_PARAMETERS = {  # measured on the authors' code: all, and those that train
    "dn_detr_r50_12ep": (43_694_977, 43_472_577),
    "dn_detr_r50_50ep": (43_694_977, 43_472_577),
    "dn_detr_r50_dc5_50ep": (43_694_977, 43_472_577),
    "dn_detr_r50_dc5_3pat_12ep": (43_695_745, 43_473_345),
    "dn_detr_r101_dc5_3pat_12ep": (62_635_649, 62_413_249),
    "dn_deformable_detr_r50_50ep": (47_429_154, 47_206_754),
    "dn_deformable_encoder_r50_50ep": (48_488_589, 48_266_189),
    # 1 row of 91 in the class head of the encoder: 90 * 257 fewer
    "dn_dino_r50_36ep": (47_650_557 - 23_130, 47_428_157 - 23_130),
}
WORDS = {
    "train": (
        "output_dir init_checkpoint epochs max_iter seed device accumulate clip_grad amp ema "
        "scale_lr overwrite"
    ),
    "model": "num_classes denoising",
    "dataset": "train val",
    "dataloader": "train test evaluator",
}


def load(path, *overrides):
    return LazyConfig.apply_overrides(LazyConfig.load(str(path)), list(overrides))


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@by_name(CONFIGS)
def test_a_saved_config_is_the_same_config(path, tmp_path):
    cfg = load(path)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert not (tmp_path / "config.yaml.pkl").exists()  # what cannot be saved as text ends there
    text = (tmp_path / "config.yaml").read_text()
    LazyConfig.save(load(tmp_path / "config.yaml"), str(tmp_path / "again.yaml"))
    assert (tmp_path / "again.yaml").read_text() == text


@by_name(CONFIGS)
def test_a_config_has_the_words_of_every_config(path):
    cfg = load(path)
    assert {"optimizer", "lr_multiplier"} <= cfg.keys()
    for node, words in WORDS.items():
        assert set(words.split()) <= set(cfg[node].keys())
    assert cfg.model.num_classes is None and path.stem in cfg.train.output_dir
    assert (
        instantiate(cfg.lr_multiplier)(0.0) <= 1
        and 0 < instantiate(cfg.lr_multiplier)(0.999) <= 0.1
    )


@by_name([path for path in CONFIGS if path.stem in NUM_PARAMETERS])
def test_parameters_are_as_many_as_published(path):
    model = instantiate(load(path, "model.num_classes=91").model)
    counted = [
        sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
        for trained in (0, 1)
    ]
    assert tuple(counted) == NUM_PARAMETERS[path.stem]


def check_steps(model, denoising):
    """A step with targets in one of two images, and one without any: every parameter learns."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = []
    for objects in (2, 0):
        model.zero_grad(set_to_none=True)
        losses = model([make_input(64, 96, objects), make_input(96, 64, 0, seed=1)])
        names.append(sorted(losses))
        sum(losses.values()).backward()
        assert not [name for name, p in trained.items() if p.grad is None]
        assert not [name for name, p in trained.items() if not p.grad.isfinite().all()]
    assert names[0] == names[1]
    assert any(name.startswith("dn_") for name in names[0]) == denoising


@pytest.mark.fault(48)
@pytest.mark.fault(61)
@by_name(CONFIGS)
def test_training_and_detection(path):
    cfg = load(path, "model.num_classes=3")
    # Frozen norms without pre-trained statistics let random activations of a deep network overflow.
    cfg.model.backbone.norm = "BN"
    for part in (cfg.model.encoder, cfg.model.decoder):  # all kinds of layers, but not all of them
        part.update(num_layers=min(part.num_layers, 2), feedforward_dim=64)
    model = instantiate(cfg.model).train()
    check_steps(model, denoising=not path.stem.startswith("dab_"))
    model.denoising = None
    check_steps(model, denoising=False)
    with torch.no_grad():
        (output,) = model.eval()([make_input(64, 96)])
    found = output["instances"]
    assert len(found) > 0 and found.scores.isfinite().all()
