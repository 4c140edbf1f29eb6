"""What every process of `tests.processes` has imported when it starts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)

import dn_detr.engine.launch  # noqa: E402, F401
import tests.engine.tiny  # noqa: E402, F401
