"""MODEL_ZOO.md lists every config, with the parameters that its model has."""

import re
from pathlib import Path

import torch

from detectron2.config import LazyConfig, instantiate

ROOT = Path(__file__).parents[2]


def test_the_zoo_lists_every_config_with_its_parameters():
    rows = re.findall(
        r"^\| \[[\w/]+\]\((projects/\S+\.py)\) \|.*?\| (\d+\.\d\d) \|",
        (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    listed = {path: float(millions) for path, millions in rows}
    counted = {}
    for path in sorted(ROOT.glob("projects/*/configs/*.py")):
        cfg = LazyConfig.load(str(path)).model
        cfg.num_classes = cfg.num_classes or 80
        with torch.device("meta"):
            model = instantiate(cfg)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        counted[path.relative_to(ROOT).as_posix()] = millions
    assert listed.keys() == counted.keys()
    assert {path: round(millions, 2) for path, millions in counted.items()} == listed
