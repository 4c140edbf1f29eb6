"""The step: accumulation, clipping, number formats, and what stops it."""

import math

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from dn_detr.checkpoint.reading import CheckpointError
from dn_detr.engine.failures import LocalError, NonFiniteError, explain
from dn_detr.engine.trainer import Trainer

from tests.engine.tiny import TinyDetector

CLASSES = 3


def make_batch(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for index in range(count):
        instances = Instances((16, 20))
        instances.gt_boxes = Boxes(torch.tensor([[1.0, 2.0, 8.0 + index, 9.0]]))
        instances.gt_classes = torch.tensor([index % CLASSES])
        image = torch.randint(0, 256, (3, 16, 20), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": 16, "width": 20})
    return batch


def make_trainer(batches, lr=0.1, optimizer=torch.optim.SGD, model=None, **kwargs):
    torch.manual_seed(0)
    model = model or TinyDetector(CLASSES)
    return Trainer(model, iter(batches), optimizer(model.parameters(), lr=lr), **kwargs)


def run(trainer, steps=1):
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(steps):
            trainer.storage.iter = trainer.iter
            trainer.run_step()
    return {name: value for name, (value, _) in trainer.storage.latest().items()}


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


@pytest.mark.parametrize("clip_grad", [None, {"max_norm": 0.1}])
def test_accumulated_batches_equal_the_big_batch(clip_grad):
    images = make_batch(6)
    whole = make_trainer([images], clip_grad=clip_grad)
    parts = make_trainer([images[:2], images[2:4], images[4:]], accumulate=3, clip_grad=clip_grad)
    metrics, metrics_of_parts = run(whole), run(parts)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-5, atol=1e-7)
    for name in ("total_loss", "loss_ce", "loss_bbox", "grad_norm"):
        assert metrics_of_parts[name] == pytest.approx(metrics[name], rel=1e-5)


def test_metrics_are_those_of_detectron2():
    metrics = run(make_trainer([make_batch(2)]))
    assert set(metrics) == {
        *("total_loss", "loss_ce", "loss_bbox", "grad_norm", "data_time", "rank_data_time")
    }
    assert metrics["total_loss"] == pytest.approx(metrics["loss_ce"] + metrics["loss_bbox"])


def test_gradient_is_clipped_over_all_parameters_together():
    free, clipped = (
        make_trainer([make_batch(3)]),
        make_trainer([make_batch(3)], clip_grad={"max_norm": 0.01}),
    )
    before = weights(free)
    norm = run(free)["grad_norm"]
    assert run(clipped)["grad_norm"] == pytest.approx(norm)  # the norm before clipping
    assert norm > 0.01
    moved = {k: weights(clipped)[k] - v for k, v in before.items() if v.is_floating_point()}
    length = torch.cat([v.flatten() for v in moved.values()]).norm().item()
    assert length == pytest.approx(0.1 * 0.01, rel=1e-3)  # lr * max_norm
    for name, value in moved.items():
        expected = (weights(free)[name] - before[name]) * (0.01 / norm)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-7)


def test_bf16_autocast_on_the_cpu():
    seen = []
    model = TinyDetector(CLASSES)
    model.class_head.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    metrics = run(make_trainer([make_batch(3)], model=model, amp_dtype=torch.bfloat16))
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert metrics["total_loss"] == pytest.approx(
        run(make_trainer([make_batch(3)]))["total_loss"], rel=0.2
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_training_on_a_gpu(dtype):
    model = TinyDetector(CLASSES).to("cuda")
    trainer = make_trainer([make_batch(3)] * 10, model=model, amp_dtype=dtype, lr=0.01)
    metrics = run(trainer, steps=10)
    assert math.isfinite(metrics["total_loss"])
    assert ("grad_scaler" in trainer.state_dict()) == (dtype == torch.float16)


class BreaksLoss(TinyDetector):
    from_width = 0  # number of images in a batch from which on it breaks

    def forward(self, batch):
        losses = super().forward(batch)
        return losses if len(batch) < self.from_width else self.breaks(losses)

    def breaks(self, losses):
        return {**losses, "loss_bbox": losses["loss_bbox"] * math.nan}


class BreaksGradient(BreaksLoss):
    def breaks(self, losses):
        # sqrt has an infinite slope at 0: the loss is finite, its gradient is not
        return {**losses, "loss_ce": (losses["loss_ce"] * 0).sqrt()}


@pytest.mark.fault(52)
@pytest.mark.fault(53)
@pytest.mark.parametrize(
    "model, told", [(BreaksLoss, "loss_bbox=nan"), (BreaksGradient, "gradient of loss_ce")]
)
def test_what_is_not_finite_stops_before_the_step(model, told, tmp_path):
    first, second = make_batch(2), make_batch(3, seed=1)
    for number, sample in enumerate([*first, *second]):
        sample.update(image_id=number, file_name=f"{number}.jpg")
    model = model(CLASSES)
    trainer = make_trainer(
        [first, second],
        model=model,
        accumulate=2,
        clip_grad={"max_norm": 0.1},
        seed=1,
        dump_dir=str(tmp_path),
    )
    model.from_width = 3  # only the second batch is that large
    before = weights(trainer)
    with pytest.raises(NonFiniteError) as info:
        run(trainer)
    assert f"iteration 0: process 0: {told}, with images 2 (2.jpg), 3 (3.jpg)" in str(info.value)
    assert "0 (0.jpg)" not in str(info.value) and "before the step" in str(info.value)
    for key, value in before.items():
        assert torch.equal(weights(trainer)[key], value)
    path = tmp_path / "nonfinite_iter_0000000_process_0_part_1.pth"
    assert f"the batch is written to {path}" in str(info.value)
    dumped = torch.load(path, weights_only=True)["batch"]
    assert [sample["image_id"] for sample in dumped] == [2, 3, 4]
    assert dumped[1]["image"].equal(second[1]["image"])
    assert dumped[1]["instances"]["gt_boxes"].equal(second[1]["instances"].gt_boxes.tensor)


@pytest.mark.fault(52)
def test_a_batch_that_cannot_be_dumped_is_still_named(tmp_path):
    (tmp_path / "file").touch()
    trainer = make_trainer(
        [make_batch(2)], model=BreaksLoss(CLASSES), dump_dir=str(tmp_path / "file")
    )
    with pytest.raises(NonFiniteError, match="loss_bbox=nan, .* which could not be written to"):
        run(trainer)


class NeedsMemory(TinyDetector):
    def forward(self, batch):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nMore")


@pytest.mark.fault(55)
def test_out_of_memory_names_the_batch_and_remedies():
    batch = make_batch(3)
    batch[1].update(image=torch.zeros(3, 40, 30), image_id=8, file_name="large.jpg")
    trainer = make_trainer([batch], model=NeedsMemory(CLASSES))
    with pytest.raises(LocalError) as info:
        run(trainer)
    for part in (
        "iteration 0: out of memory with 3 images",
        "30x40 pixels as the model gets it: 8 (large.jpg)",
        "objects in an image: at most 1",
        "dataloader.train.total_batch_size",
        "activation_checkpointing=True",
        "train.amp.enabled=True",
        "dataloader.train.mapper.augmentations",
        "CUDA out of memory. Tried to allocate 1 GiB.",
    ):
        assert part in str(info.value)


def test_another_runtime_error_is_left_as_it_is():
    class Breaks(TinyDetector):
        def forward(self, batch):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="^a bug$"):
        run(make_trainer([make_batch(2)], model=Breaks(CLASSES)))


@pytest.mark.fault(63)
def test_a_step_draws_the_same_numbers_for_the_same_seed():
    class Draws(TinyDetector):
        drawn = []

        def forward(self, batch):
            self.drawn.append(torch.rand(()).item())
            return super().forward(batch)

    def drawn(seed):
        Draws.drawn = []
        run(make_trainer([make_batch(2)] * 3, model=Draws(CLASSES), seed=seed), steps=3)
        return Draws.drawn

    assert drawn(1) == drawn(1)
    assert not set(drawn(1)) & set(drawn(2))
    assert len(set(drawn(1))) == 3


def test_hooks_are_told_of_the_backward_pass():
    class Spy(HookBase):
        norms = []

        def after_backward(self):
            grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            self.norms.append(torch.cat([g.flatten() for g in grads]).norm().item())

    trainer = make_trainer([make_batch(2)] * 2, accumulate=2)
    spy = Spy()
    trainer.register_hooks([spy])
    metrics = run(trainer)
    assert spy.norms == [pytest.approx(metrics["grad_norm"])]  # once a step, before clipping


def test_a_single_loss_tensor_will_do():
    class OneLoss(TinyDetector):
        def forward(self, batch):
            return sum(super().forward(batch).values())

    metrics = run(make_trainer([make_batch(2)], model=OneLoss(CLASSES)))
    assert math.isfinite(metrics["total_loss"])


def test_state_restores_optimizer_and_iteration(tmp_path):
    batches = [make_batch(2, seed) for seed in range(4)]
    whole = make_trainer(batches, optimizer=torch.optim.AdamW)
    run(whole, steps=4)
    first = make_trainer(batches[:2], optimizer=torch.optim.AdamW)
    run(first, steps=2)
    torch.save({"model": first.model.state_dict(), "trainer": first.state_dict()}, tmp_path / "x")
    stored = torch.load(tmp_path / "x", weights_only=True)
    second = make_trainer(batches[2:], optimizer=torch.optim.AdamW)
    second.model.load_state_dict(stored["model"])
    second.load_state_dict(stored["trainer"])
    assert second.iter == 1
    run(second, steps=2)
    for name, value in weights(whole).items():
        assert torch.equal(weights(second)[name], value)


@pytest.mark.fault(62)
def test_parts_of_a_step_draw_numbers_of_their_own_and_the_same_when_told():
    class Draws(BreaksGradient):
        drawn = []

        def forward(self, batch):
            self.drawn.append(torch.rand(()).item())
            return super().forward(batch)

    trainer = make_trainer([make_batch(2)] * 2, model=Draws(CLASSES), accumulate=2, seed=1)
    with pytest.raises(NonFiniteError):
        run(trainer)
    assert Draws.drawn[0] != Draws.drawn[1]
    assert Draws.drawn[2:] == Draws.drawn[:2]  # looked at once more, with the same numbers


@pytest.mark.fault(53)
def test_a_gradient_that_cannot_be_looked_at_again_is_still_told():
    class Fails(BreaksGradient):
        calls = 0

        def forward(self, batch):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("no memory for that")
            return {**super().forward(batch), "constant": torch.ones(())}

    trainer = make_trainer([make_batch(2)], model=Fails(CLASSES))
    with pytest.raises(NonFiniteError, match="could not be found .no memory for that"):
        run(trainer)


@pytest.mark.fault(53)
@pytest.mark.parametrize("scale, skips", [(2.0, True), (1.0, False)])
def test_float16_skips_steps_while_its_scale_is_the_reason(monkeypatch, scale, skips):
    trainer = make_trainer([make_batch(2)], model=BreaksGradient(CLASSES))
    monkeypatch.setattr(trainer.grad_scaler, "is_enabled", lambda: True)
    monkeypatch.setattr(trainer.grad_scaler, "get_scale", lambda: scale)
    monkeypatch.setattr(trainer.grad_scaler, "step", lambda optimizer: None)
    monkeypatch.setattr(trainer.grad_scaler, "update", lambda: None)
    if skips:
        run(trainer)
        return
    with pytest.raises(NonFiniteError):
        run(trainer)


def test_a_model_left_in_eval_mode_is_refused():
    trainer = make_trainer([make_batch(2)])
    trainer.model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        run(trainer)


@pytest.mark.fault(55)
@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_out_of_memory_elsewhere(error):
    text = explain(error)
    assert text.startswith("out of memory. What takes less: (1) a smaller dataloader.train")
    assert str(error) in text


@pytest.mark.parametrize("text", ["a bug", "the launch timed out", "index 3 is out of range"])
def test_an_error_that_is_not_known_is_not_explained(text):
    assert explain(RuntimeError(text)) is None


def test_other_groups_of_parameters_are_refused():
    """The state would go to other parameters, or nowhere."""
    trainer = make_trainer([make_batch(2)])
    run(trainer)
    state = trainer.state_dict()
    other = make_trainer([make_batch(2)])
    first, *rest = other.optimizer.param_groups[0]["params"]
    other.optimizer = torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=0.1)
    with pytest.raises(
        CheckpointError, match=r"groups of \[8\] parameters, and now they are \[1, 7"
    ):
        other.load_state_dict(state)
