#!/usr/bin/env python
r"""Trains and evaluates a detector that a LazyConfig file describes.

One GPU, or the CPU where there is none (or with train.device=cpu):

    python tools/train_net.py --config-file projects/dn_detr/configs/dn_detr_r50_50ep.py

Eight GPUs (on a machine without any: two processes on the CPU with --num-gpus 2):

    python tools/train_net.py --config-file CONFIG --num-gpus 8

Two machines with eight GPUs each; on the second --machine-rank 1:

    python tools/train_net.py --config-file CONFIG --num-gpus 8 \
        --num-machines 2 --machine-rank 0 --dist-url tcp://FIRST_MACHINE:PORT

Go on with a training that was interrupted:

    python tools/train_net.py --config-file CONFIG --resume

Evaluate a checkpoint:

    python tools/train_net.py --config-file CONFIG --eval-only train.init_checkpoint=FILE

Your own data in COCO's format, and any other value of the config, after all options:

    python tools/train_net.py --config-file CONFIG \
        dataset.train.json=train.json dataset.train.images=train \
        dataset.val.json=val.json dataset.val.images=val train.epochs=12
"""

from dn_detr.engine.launch import run

if __name__ == "__main__":
    run(epilog=__doc__)
