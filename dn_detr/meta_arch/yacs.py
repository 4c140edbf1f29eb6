"""DN-DETR from a yacs config: a bridge to the LazyConfig files, which describe a model once."""

from typing import Any

from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import CfgNode, LazyConfig, instantiate  # noqa: E402
from detectron2.data import MetadataCatalog  # noqa: E402

from dn_detr.engine.overrides import apply_overrides  # noqa: E402


def add_dn_detr_config(cfg: CfgNode) -> None:
    """Add the node ``MODEL.DN_DETR`` to detectron2's yacs config.

    - ``CONFIG_FILE``: path of a LazyConfig file, such as
      ``projects/dn_detr/configs/dn_detr_r50_50ep.py``.
    - ``OVERRIDES``: list of overrides in its grammar, such as ``["model.num_classes=3"]``.

    With ``MODEL.META_ARCHITECTURE: DNDETR``, `detectron2.modeling.build_model` then gives the
    network of that file.
    """
    cfg.MODEL.DN_DETR = CfgNode({"CONFIG_FILE": "", "OVERRIDES": []})


def model_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of `DNDETR` from a yacs config: the instantiated parts of a LazyConfig's model.

    Where the file leaves ``model.num_classes`` open, it is the number of classes of
    ``DATASETS.TRAIN[0]``.

    Raises:
        ValueError: no LazyConfig file is named, or neither it nor the data tell the number of
            classes.
        ConfigError: an override that the file does not know.
    """
    node = cfg.MODEL.get("DN_DETR")
    if node is None or not node.CONFIG_FILE:
        raise ValueError(
            "MODEL.META_ARCHITECTURE DNDETR needs MODEL.DN_DETR.CONFIG_FILE, the path of a "
            "LazyConfig file; call dn_detr.meta_arch.add_dn_detr_config(cfg) before merging, and "
            "see projects/dn_detr/configs"
        )
    config = LazyConfig.load(node.CONFIG_FILE)
    apply_overrides(config, list(node.OVERRIDES))
    model = config.model
    if model.num_classes is None:
        names = [MetadataCatalog.get(name).get("thing_classes") for name in cfg.DATASETS.TRAIN[:1]]
        if not names or names[0] is None:
            raise ValueError(
                f"{node.CONFIG_FILE} leaves model.num_classes open: name a registered data set in "
                "DATASETS.TRAIN, or add 'model.num_classes=N' to MODEL.DN_DETR.OVERRIDES"
            )
        model.num_classes = len(names[0])
    return {key: instantiate(model[key]) for key in model if key != "_target_"}
