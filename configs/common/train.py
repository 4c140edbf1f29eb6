"""What governs a training, apart from model, data, optimizer and schedule.

Every key here can be overridden on the command line: `train.epochs=12 train.amp.enabled=True`.
"""

train = dict(
    output_dir="./output",
    # Weights to start from: a file, an address, "" to train from scratch. With --eval-only: the
    # checkpoint to evaluate.
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    epochs=50,
    max_iter=None,  # null: epochs * images / (total_batch_size * accumulate), rounded up
    seed=42,  # negative: a random one
    dist_timeout=1800,  # seconds that a process waits for the others; evaluation counts, too
    device=None,  # null: the GPU where there is one, else the CPU
    accumulate=1,  # batches of dataloader.train.total_batch_size that make up one step
    clip_grad=dict(
        enabled=True,
        params=dict(max_norm=0.1, norm_type=2.0),  # over all parameters together
    ),
    amp=dict(enabled=False, dtype="bfloat16"),  # or "float16", on a GPU only
    ema=dict(enabled=False, decay=0.9997),  # evaluated beside the raw weights, as bbox_ema
    # Learning rates are for this many images a step; scale_lr adapts optimizer.lr to others.
    reference_batch_size=16,
    scale_lr=False,
    overwrite=False,  # True: start afresh in an output_dir that already holds checkpoints
    ddp=dict(
        broadcast_buffers=False,
        find_unused_parameters=False,
        fp16_compression=False,
    ),
    checkpointer=dict(period=None, max_to_keep=3),  # null: one epoch
    eval_period=None,  # null: one epoch; 0: only at the end
    log_period=20,
    # model_best.pth holds the weights that were best in this; null: AP of the averaged weights
    # ("bbox_ema/AP") where there are some, else of the raw ones ("bbox/AP").
    best_metric=None,
)
