"""Loading, overriding and resolving a config, and what is refused."""

import logging
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf

from dn_detr.data.categories import DatasetError
from dn_detr.engine.config import ConfigError, load_config, resolve_config

CONFIG = str(Path(__file__).parent / "tiny_config.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The override that puts the shapes into a folder of their own."""
    return f"dataset.root={tmp_path_factory.mktemp('shapes')}"


def refused(overrides, path=CONFIG):
    with pytest.raises(ConfigError) as info:
        resolve_config(load_config(path, overrides))
    return str(info.value)


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("train.max_iter=7", "train.max_iter", 7),
        ("train.epochs=0.5", "train.epochs", 0.5),
        ("train.checkpointer.max_to_keep=null", "train.checkpointer.max_to_keep", None),
        ("train.output_dir=2026", "train.output_dir", "2026"),
        ("train.output_dir='${dataset.root}/out'", "train.output_dir", "./datasets/shapes/out"),
        ("train.init_checkpoint=", "train.init_checkpoint", ""),
        ("model=null", "model", None),
        ("model.width=16", "model.width", 16),  # not in the config, but TinyDetector takes it
        ("dataloader.test.batch_size=2", "dataloader.test.batch_size", 2),
        ("lr_multiplier.milestones=[30]", "lr_multiplier.milestones", [30]),
        ("train.amp={enabled: True}", "train.amp", {"enabled": True, "dtype": "bfloat16"}),
        ("optimizer.params.lr_factor_func.factor=1", "optimizer.params.lr_factor_func.factor", 1),
        ("+train.note=hello", "train.note", "hello"),
        ("+extra.deep=1", "extra.deep", 1),
        ("dataset.train.json='/a, b/c=d.json'", "dataset.train.json", "/a, b/c=d.json"),
    ],
)
def test_override(override, key, value, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert OmegaConf.select(load_config(CONFIG, [override]), key) == value


def test_no_init_checkpoint_is_from_scratch():
    assert load_config(CONFIG, ["train.init_checkpoint=null"]).train.init_checkpoint == ""


def test_epochs_alone_give_the_length_and_a_number_of_iterations_wins():
    assert isinstance(load_config(CONFIG).train.max_iter, int)
    assert load_config(CONFIG, ["train.epochs=3"]).train.max_iter is None
    assert load_config(CONFIG, ["train.epochs=3", "train.max_iter=5"]).train.max_iter == 5


@pytest.mark.parametrize("averaged, metric", [(True, "bbox_ema/AP"), (False, "bbox/AP")])
def test_the_best_weights_are_the_averaged_ones_where_there_are_some(data, averaged, metric):
    cfg = load_config(CONFIG, [data, f"train.ema.enabled={averaged}"])
    resolve_config(cfg)
    assert cfg.train.best_metric == metric


def test_override_with_a_target_replaces_the_node():
    target = "fvcore.common.param_scheduler.ConstantParamScheduler"
    cfg = load_config(CONFIG, [f"lr_multiplier={{_target_: {target}, value: 1.0}}"])
    assert instantiate(cfg.lr_multiplier)(0.9) == 1.0


@pytest.mark.parametrize(
    "overrides, parts",
    [
        pytest.param(
            ["train.max_iters=5"],
            ["unknown key train.max_iters", "did you mean train.max_iter?"],
            marks=pytest.mark.fault(1),
        ),
        pytest.param(
            ["max_iter=5"],
            ["did you mean train.max_iter?", "+max_iter=..."],
            marks=pytest.mark.fault(1),
        ),
        pytest.param(
            ["optimizer.Lr=1"],
            ["unknown key optimizer.Lr; did you mean optimizer.lr?", "weight_decay"],
            marks=pytest.mark.fault(2),
        ),
        pytest.param(["model.widht=8"], ["did you mean model.width?"], marks=pytest.mark.fault(1)),
        (["dataset.generate.num_trian=5"], ["did you mean dataset.generate.num_train"]),
        (["train.clip_grad={enabld: False}"], ["did you mean train.clip_grad.enabled?"]),
        (["train.seed.x=1"], ["train.seed is the value 42"]),
        (["+train.seed.x=1"], ["train.seed is the value 42"]),
        (["dataset.generate=null", "dataset.generate.size=9"], ["dataset.generate is null"]),
        (["lr_multiplier.values.5=1"], ["lr_multiplier.values is a list of 2"]),
        pytest.param(
            ["train.max_iter=abc"],
            ["train.max_iter expects an integer, got str"],
            marks=pytest.mark.fault(4),
        ),
        pytest.param(
            ["train.max_iter=2.5"],
            ["train.max_iter expects an integer, got float"],
            marks=pytest.mark.fault(4),
        ),
        (["train.amp.enabled=1"], ["train.amp.enabled expects True or False"]),
        pytest.param(
            ["optimizer.lr=fast"], ["optimizer.lr expects a number"], marks=pytest.mark.fault(4)
        ),
        pytest.param(
            ["TRAIN.MAX_ITER", "5"],
            ["use train.max_iter=5 instead of TRAIN.MAX_ITER 5"],
            marks=pytest.mark.fault(5),
        ),
        pytest.param(
            ["MODEL.WEIGHTS", "a.pth"],
            ["use train.init_checkpoint=a.pth instead of MODEL.WEIGHTS"],
            marks=pytest.mark.fault(5),
        ),
        pytest.param(
            ["SOLVER.BASE_LR=1"],
            ["unknown key SOLVER.BASE_LR; did you mean optimizer.lr?"],
            marks=pytest.mark.fault(5),
        ),
        (["x.y=1"], ["unknown key x.y. "]),
        (["train.ema=True"], ["train.ema is a section, not a value", "train.ema.enabled=..."]),
        (["train.clip_grad=0.1"], ["train.clip_grad.enabled=..."]),
        (["train.amp=null"], ["train.amp.enabled=..."]),
        (["train.seed=1", "--resume"], ["--resume has to stand before the key=value overrides"]),
        (["~train.seed"], ["train.seed=null"]),
        (["dataset.train.json=a,b"], ["lists several values"]),
        (["dataset.train.json=a=b"], ["cannot read the override 'dataset.train.json=a=b'"]),
    ],
)
def test_override_is_refused(overrides, parts):
    message = refused(overrides)
    for part in parts:
        assert part in message


@pytest.mark.fault(6)
def test_config_file_that_is_none(tmp_path):
    assert refused([], "") == "no config given: --config-file projects/dn_detr/configs/NAME.py"
    assert f"config file {tmp_path}/no.py does not exist" in refused([], str(tmp_path / "no.py"))
    message = refused([], str(tmp_path / "x.txt"))
    assert f"config file {tmp_path}/x.txt: expected a .py or .yaml file" in message


@pytest.mark.fault(7)
def test_config_file_with_a_mistake_is_shown_with_its_line(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("train = dict(\n  seed=1\n  x=2)\n")
    assert f"{broken}:2: SyntaxError" in refused([], str(broken))
    broken.write_text("import math\nfrom math import no_such_name\n")
    assert f"{broken}:2: ImportError: cannot import name" in refused([], str(broken))
    (tmp_path / "middle.py").write_text("from .broken import train\n")
    assert f"{broken}:2: ImportError" in refused([], str(tmp_path / "middle.py"))
    broken.write_text("\n\nx = 1 / 0\n")
    assert f"{broken}:3: ZeroDivisionError" in refused([], str(broken))
    broken.write_text("train = dict(seed=1)\n")
    assert "does not define model, dataset, dataloader" in refused([], str(broken))
    with pytest.raises(ModuleNotFoundError):  # the import function is put back after an error
        import no_such_module  # noqa: F401


INVALID = {
    "train.max_iter": (0, "an integer of at least 1"),
    "train.accumulate": (0, "an integer of at least 1"),
    "train.log_period": (0, "an integer of at least 1"),
    "train.checkpointer.period": (0, "an integer of at least 1"),
    "train.checkpointer.max_to_keep": (0, "an integer of at least 1"),
    "train.reference_batch_size": ("null", "an integer of at least 1"),
    "train.eval_period": (-1, "an integer: 0 (at the end) or more"),
    "train.seed": ("null", "an integer (negative: a random one)"),
    "train.ema.decay": (2, "0 <= decay < 1"),
    "train.clip_grad.params.max_norm": ("null", "a number above 0 (train.clip_grad.enabled=False"),
    "train.clip_grad.params.norm_type": (-2, "a number above 0"),
    "train.amp.dtype": ("int8", "bfloat16 or float16"),
    "optimizer.lr": (-1, "a finite number of at least 0"),
    "optimizer.weight_decay": ("nan", "a finite number of at least 0"),
    "dataloader.train.total_batch_size": (0, "an integer of at least 1"),
    "dataloader.train.num_workers": (-1, "an integer of at least 0"),
    "dataloader.test.num_workers": (-1, "an integer of at least 0"),
    "dataloader.test.batch_size": (0, "an integer of at least 1"),
    "+dataloader.train.on_bad_image": ("ignore", "error or skip"),
    "+train.dist_timeout": (0, "a number of seconds above 0"),
}


@pytest.mark.fault(8)
def test_all_invalid_values_are_listed_at_once():
    message = refused(
        ["dataset.root=/nowhere", "lr_multiplier.values=[1]"]  # found without any data
        + [f"{key}={value}" for key, (value, _) in INVALID.items()]
    )
    for key, (value, expected) in INVALID.items():
        assert f"\n  {key.lstrip('+')}={value}: expected {expected}" in message
    assert "\n  lr_multiplier: ValueError: MultiStep scheduler requires" in message
    assert len(message.splitlines()) == 2 + len(INVALID)


@pytest.mark.fault(8)
@pytest.mark.parametrize("epochs", ["0", "nan", "inf", "null"])
def test_length_of_nothing_is_refused(epochs):
    message = refused([f"train.epochs={epochs}"])
    assert f"train.epochs={epochs}: expected a finite number above 0" in message


@pytest.mark.fault(8)
def test_parts_that_are_taken_out_are_listed():
    parts = ("model", "lr_multiplier", "train.output_dir", "dataset.val.json", "dataloader.train")
    message = refused([f"{part}=null" for part in parts])
    for part in parts:
        assert f"\n  {part}" in message and "is not given" in message


@pytest.mark.fault(9)
def test_batch_has_to_be_divisible_by_the_processes(data):
    cfg = load_config(CONFIG, [data, "dataloader.train.total_batch_size=7"])
    with pytest.raises(ConfigError, match="cannot be shared by 3 processes: take 6 or 9"):
        resolve_config(cfg, num_processes=3)


@pytest.mark.fault(10)
@pytest.mark.fault(11)
def test_gpu_that_is_not_there(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused([data, "train.device=cuda"])
    assert "train.device=cuda, but torch finds no GPU: train.device=cpu" in message
    message = refused([data, "train.amp.enabled=True", "train.amp.dtype=float16"])
    assert "float16 needs a GPU: train.amp.dtype=bfloat16" in message
    cfg = load_config(CONFIG, [data, "train.device=null"])
    resolve_config(cfg)
    assert cfg.train.device == "cpu"


@pytest.mark.fault(11)
def test_gpu_of_a_number_that_is_not_there(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "train.device=cuda:2, but GPUs are cuda:0 to cuda:1" in refused(
        [data, "train.device=cuda:2"]
    )
    resolve_config(load_config(CONFIG, [data, "train.device=cuda:1"]))


@pytest.mark.gpu
@pytest.mark.fault(11)
def test_gpu_that_is_there(data):
    for device in ("cuda", "cuda:0", "null"):
        cfg = load_config(CONFIG, [data, f"train.device={device}", "train.amp.dtype=float16"])
        resolve_config(cfg)
        assert cfg.train.device == device.replace("null", "cuda")


def test_one_gpu_for_several_processes_is_refused(data):
    cfg = load_config(CONFIG, [data, "train.device=cuda:1"])
    with pytest.raises(ConfigError, match="train.device=cuda:1 names one GPU for 2 processes"):
        resolve_config(cfg, num_processes=2)


def test_unknown_device_is_refused(data):
    assert "train.device=gpu: expected cuda, cpu or null" in refused([data, "train.device=gpu"])


def test_classes_and_length_come_from_the_data(data):
    cfg = load_config(
        CONFIG,
        [data, "train.max_iter=null", "train.epochs=2.5", "train.accumulate=2"]
        + ["train.eval_period=null", "train.checkpointer.period=null"],
    )
    resolve_config(cfg)  # 12 images, 2 batches of 4 in a step
    assert cfg.model.num_classes == 5
    assert cfg.train.max_iter == 4  # 2.5 epochs of 1.5 steps, rounded up
    assert cfg.train.eval_period == cfg.train.checkpointer.period == 2
    again = OmegaConf.to_container(cfg, resolve=True)
    resolve_config(cfg)
    assert OmegaConf.to_container(cfg, resolve=True) == again


@pytest.mark.fault(50)
@pytest.mark.parametrize("eval_only", [False, True])
@pytest.mark.parametrize("number", [0, 7, "many"])
def test_number_of_classes_that_does_not_fit_is_refused(data, number, eval_only):
    cfg = load_config(CONFIG, [data, f"model.num_classes={number}"])
    with pytest.raises(DatasetError) as info:
        resolve_config(cfg, eval_only=eval_only)
    part = "val.json" if eval_only else "train.json"
    for text in (f"model.num_classes={number}", f"{part} has 5 categories", "model.num_classes=5"):
        assert text in str(info.value)


@pytest.mark.fault(51)
def test_data_that_are_not_there(data, tmp_path, monkeypatch):
    resolve_config(load_config(CONFIG, [data]))  # makes them
    root = data.partition("=")[2]
    message = refused(
        [data, f"dataset.train.json={root}/trian.json", f"dataset.val.images={tmp_path}/no/val"]
    )
    assert f"dataset.train.json: {root}/trian.json does not exist; {root} holds no tr" in message
    assert "holds no trian.json, but train.json" in message
    assert (
        f"dataset.val.images: {tmp_path}/no/val does not exist; {tmp_path} holds no no" in message
    )
    assert "dataset.val.json" not in message
    (tmp_path / "coco2017").mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    config = Path(__file__).parents[2] / "projects" / "dn_detr" / "configs" / "dn_detr_r50_50ep.py"
    message = refused([], str(config))
    json = f"{tmp_path}/coco/annotations/instances_train2017.json"
    assert f"dataset.train.json: {json} does not exist; {tmp_path} holds no coco, but coco2017" in (
        message
    )
    assert f"DETECTRON2_DATASETS is '{tmp_path}': set it to the folder that holds" in message
    with pytest.raises(ConfigError) as info:
        resolve_config(load_config(str(config)), eval_only=True)
    assert "dataset.val.json" in str(info.value) and "dataset.train" not in str(info.value)


def test_train_and_val_need_the_same_categories(data, tmp_path):
    cfg = load_config(CONFIG, [data])
    resolve_config(cfg)
    path = tmp_path / "val.json"
    path.write_text(Path(cfg.dataset.val.json).read_text().replace('"ring"', '"torus"'))
    message = refused([data, f"dataset.val.json={path}"])
    assert "different categories" in message and "'ring'" in message and "'torus'" in message


def test_evaluation_takes_the_classes_of_val(data, tmp_path):
    missing = f"dataset.train.json={tmp_path}/missing.json"
    cfg = load_config(CONFIG, [data, missing, "train.max_iter=null"])
    resolve_config(cfg, eval_only=True)
    assert cfg.model.num_classes == 5 and cfg.train.max_iter is None


def test_learning_rate_for_another_batch_is_said_and_scaled_on_request(data, caplog, fresh_logs):
    with caplog.at_level(logging.INFO, logger="dn_detr"):
        cfg = load_config(CONFIG, [data, "optimizer.lr=1e-4"])
        resolve_config(cfg)
    assert cfg.optimizer.lr == 1e-4
    assert "optimizer.lr=0.0001 is meant for 16 images in a step, here there are 4" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="dn_detr"):
        cfg = load_config(CONFIG, [data, "optimizer.lr=1e-4", "train.scale_lr=True"])
        resolve_config(cfg)
    assert cfg.optimizer.lr == pytest.approx(2.5e-5)
    assert "0.0001 for 16 images, so 2.5e-05 for 4" in caplog.text
    resolve_config(cfg)  # what is resolved is not scaled again
    assert cfg.optimizer.lr == pytest.approx(2.5e-5)


@pytest.mark.fault(14)
def test_saved_config_loads_and_is_the_same(data, tmp_path):
    cfg = load_config(CONFIG, [data, "train.ema.enabled=True"])
    resolve_config(cfg)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert not (tmp_path / "config.yaml.pkl").exists()
    loaded = load_config(str(tmp_path / "config.yaml"), ["train.max_iter=9"])
    assert loaded.train.max_iter == 9
    assert loaded.train.ema.enabled
    models = []
    for config in (cfg, loaded):
        torch.manual_seed(config.train.seed)
        models.append(instantiate(config.model))
    assert type(models[0]) is type(models[1])
    weights, again = (model.state_dict() for model in models)
    assert list(weights) == list(again)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    model = models[1]
    loaded.optimizer.params.model = model
    rates = {
        name: group["lr"]
        for group in instantiate(loaded.optimizer).param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is p for p in group["params"])
    }
    assert rates["backbone.0.weight"] == pytest.approx(1e-3)
    assert rates["class_head.weight"] == pytest.approx(1e-2)
    assert instantiate(loaded.lr_multiplier)(0.81) == 0.1


def test_published_optimizer_and_schedules():
    folder = Path(__file__).parents[2] / "configs" / "common"
    optimizer = LazyConfig.load(str(folder / "optim.py")).AdamW
    optimizer.params.model = torch.nn.Sequential()
    optimizer.params.model.add_module("backbone", torch.nn.Linear(2, 2))
    optimizer.params.model.add_module("norm", torch.nn.LayerNorm(2))
    groups = instantiate(optimizer).param_groups
    assert sorted(g["lr"] for g in groups) == pytest.approx([1e-5, 1e-4])
    assert {g["weight_decay"] for g in groups} == {1e-4}  # norms and biases too
    schedules = LazyConfig.load(str(folder / "schedules.py"))
    for name, before, after in (("50ep", 0.799, 0.801), ("12ep", 10.9 / 12, 11.1 / 12)):
        multiplier = instantiate(schedules[f"lr_multiplier_{name}"])
        assert [multiplier(x) for x in (0.0, before, after, 0.999)] == [1.0, 1.0, 0.1, 0.1]
    cosine = instantiate(schedules.lr_multiplier_warmup_cosine)
    assert cosine(0.0) == pytest.approx(0.01)
    assert cosine(0.05) == pytest.approx(1.0, abs=0.01)
    assert cosine(1.0) == pytest.approx(0.01, abs=0.001)
