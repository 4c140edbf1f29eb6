"""Which config a published checkpoint fits, told by its arguments, names and shapes."""

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dn_detr.checkpoint.arguments import compare_arguments
from dn_detr.checkpoint.formats import Format, first_name, rename, sample
from dn_detr.checkpoint.reading import CheckpointError
from dn_detr.checkpoint.state_dicts import OtherModelError, convert_state_dict
from dn_detr.requirements import require_detectron2

require_detectron2()

from detectron2.config import LazyConfig, instantiate  # noqa: E402

logger = logging.getLogger(__name__)


def check_same_model(
    published: Mapping[str, Tensor],
    arguments: Mapping[str, Any] | None,
    model: nn.Module,
    known: Format,
) -> list[str]:
    """Checks that a model has the parts of a published one, and was built as its arguments say.

    Args:
        published: state_dict.
        arguments: it was trained with; None where they are not known.
        model: the model that the weights are for.
        known: the published one's format.

    Returns:
        the names of the arguments that were compared.

    Raises:
        OtherModelError: something differs; the message names it all.
    """
    compared, wrong = compare_arguments(arguments or {}, model, known.without_effect)
    wrong += _other_kinds(published, model.state_dict(), known)
    if wrong:
        listing = "\n".join(f"  {line}" for line in wrong)
        raise OtherModelError(f"the {known.title} weights are of another model:\n{listing}")
    return compared


def _other_kinds(
    published: Mapping[str, Tensor], own: Mapping[str, Tensor], known: Format
) -> list[str]:
    """A line for each way in which the model has other parts, layer numbers and sizes apart."""
    sources, unknown = rename({first_name(name, known.tied) for name in published}, known.rules)
    theirs, ours = ({_kind(name) for name in names} - {"backbone"} for names in (sources, own))
    lines = []
    foreign = [name for name in unknown if name.startswith("backbone.")]
    if foreign and not any(name.startswith("backbone.") for name in sources):
        lines.append(f"the backbone in the file is no ResNet: {sample(foreign, 3)}")
    if theirs - ours:
        lines.append(f"only in the file, by the names here: {sample(theirs - ours)}")
    if ours - theirs:
        lines.append(f"only in the model: {sample(ours - theirs)}")
    return lines


def _kind(name: str) -> str:
    if name.startswith("backbone."):
        return "backbone"
    return re.sub(r"\.\d+(?=\.|$)", ".N", re.sub(r"\.(weight|bias)$", "", name))


def find_remedy(
    published: Mapping[str, Tensor],
    arguments: Mapping[str, Any] | None,
    known: Format,
    num_classes: int,
    config_file: str,
) -> str:
    """Which config to take instead, found by trying all of that kind.

    Args:
        published, arguments, known: see `check_same_model`.
        num_classes: of the model that the weights are for.
        config_file: the config that they do not fit.
    """
    fitting = []
    for path in _shipped_configs(known.model, config_file):
        try:
            model = _build_without_weights(path, num_classes)
        except Exception as error:  # a config of the user's own, of such a name, may be broken
            logger.warning("%s cannot be tried: %r", path, error)
            continue
        with contextlib.suppress(CheckpointError):
            check_same_model(published, arguments, model, known)
            convert_state_dict(published, model.state_dict())
            fitting.append(path)
    if any(path.resolve() == Path(config_file).resolve() for path in fitting):
        return f"It fits {config_file} as that is: leave out what you override."
    if fitting:
        return f"Use --config-file {' or '.join(map(str, fitting))}."
    return (
        f"None of the configs {known.model}_r*.py fits. Set what stands in brackets, if anything, "
        f"on the command line behind the config file; or the file is incomplete."
    )


def _shipped_configs(model: str, config_file: str) -> list[Path]:
    """Configs of a kind of model in the folder of a config, and in its neighbours' folders."""
    pattern = f"{model}_r[0-9]*.py"
    folder = Path(config_file).parent
    projects = Path(os.path.normpath(folder / ".." / ".."))
    return sorted({*folder.glob(pattern), *projects.glob(f"*/configs/{pattern}")})


def _build_without_weights(config_file: Path, num_classes: int) -> nn.Module:
    """The model of a config, on the meta device."""
    cfg = LazyConfig.load(str(config_file.resolve()))  # it cannot import from above a relative path
    cfg.model.num_classes = num_classes
    with torch.device("meta"):
        return instantiate(cfg.model)
